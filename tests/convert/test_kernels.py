"""Tests how converters tell a transposed convolution's kernel from a plain one: by modules, the caller, or an error."""

import functools
import importlib.util
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bnjax import tools
from tests.support import zoo

RNG = np.random.default_rng(0)
SIZES = (2, 3, 2)  # of kernels, different in each direction


def kernel_of(library, rank, inputs, outputs, transposed):
    """Draws a kernel in the layout of the other library."""
    spatial = SIZES[:rank]
    if library == "torch":
        return RNG.normal(size=((inputs, outputs) if transposed else (outputs, inputs)) + spatial).astype(np.float32)
    return RNG.normal(size=spatial + ((outputs, inputs) if transposed else (inputs, outputs))).astype(np.float32)


def formula(library, kernel, x, transposed):
    """Computes the other library's layer by its definition, channels last; transposed convolutions have stride 2."""
    rank = x.ndim - 2
    if library == "torch":  # [k..., out, in] if transposed, [k..., in, out] if not, as in Keras
        kernel = np.moveaxis(kernel, (0, 1), (-1, -2))
    elif library == "haiku" and transposed:  # not mirrored
        kernel = np.flip(kernel, tuple(range(rank)))
    spatial, size = x.shape[1:-1], kernel.shape[:rank]
    if transposed:
        y = np.zeros((len(x), *(2 * n - 2 + k for n, k in zip(spatial, size, strict=True)), kernel.shape[-2]))
        for at in itertools.product(*map(range, size)):
            places = tuple(slice(a, a + 2 * n - 1, 2) for a, n in zip(at, spatial, strict=True))
            y[(slice(None), *places)] += x @ kernel[at].T
        return y
    y = np.zeros((len(x), *(n - k + 1 for n, k in zip(spatial, size, strict=True)), kernel.shape[-1]))
    for at in itertools.product(*map(range, size)):
        places = tuple(slice(a, a + n) for a, n in zip(at, y.shape[1:-1], strict=True))
        y += x[(slice(None), *places)] @ kernel[at]
    return y


def layer(module, rank, outputs, transposed, transpose_kernel=False, **options):
    """Builds the layer in Flax."""
    options |= dict(use_bias=False, padding="VALID", kernel_size=SIZES[:rank])
    if not transposed:
        return module.Conv(outputs, **options) if module is nn else module.Conv(out_features=outputs, **options)
    options |= dict(strides=(2,) * rank, transpose_kernel=transpose_kernel)
    return (
        module.ConvTranspose(outputs, **options)
        if module is nn
        else module.ConvTranspose(out_features=outputs, **options)
    )


class Net(nn.Module):
    """One layer, named or not."""

    rank: int
    outputs: int
    transposed: bool
    transpose_kernel: bool = False
    called: str | None = "layer"

    @nn.compact
    def __call__(self, x):
        return layer(nn, self.rank, self.outputs, self.transposed, self.transpose_kernel, name=self.called)(x)


@functools.cache
def compiled(*fields):
    """Returns the linen layer of these fields as a function of its kernel and x, compiled once for all tests."""
    net = Net(*fields)
    return jax.jit(lambda kernel, x: net.apply({"params": {"layer": {"kernel": kernel}}}, x))


@functools.cache
def compiled_nnx(rank, outputs, transposed, option):
    """Returns the nnx layer of these fields as a function of its graph, its state and x, compiled once."""
    return jax.jit(lambda graph, state, x: nnx.merge(graph, state)(x), static_argnums=0)


FROM = {"torch": tools.from_torch, "keras": tools.from_keras}
TO = {"torch": tools.to_torch, "keras": tools.to_keras}
WORD = {"torch": "layer.weight", "keras": "layer/kernel", "haiku": "layer/w"}


def load(library, kernel, variables, **options):
    if library == "haiku":
        return tools.from_haiku({"layer": {"w": kernel}}, {}, variables, **options)
    return FROM[library]({WORD[library]: kernel}, variables, **options)


def save(library, variables, like, **options):
    if library == "haiku":
        return tools.to_haiku(variables, {"layer": {"w": like}}, {}, **options)[0]["layer"]["w"]
    return TO[library](variables, **options)[WORD[library]]


def close(actual, wanted):
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


# library, rank, in and out channels, transposed, transpose_kernel: equal channels are where shapes say nothing
CASES = [
    (library, rank, *channels, transposed, option)
    for library, rank, channels, (transposed, option) in itertools.product(
        ("torch", "keras", "haiku"), (1, 2, 3), ((3, 3), (2, 4), (1, 1), (1, 3), (3, 1)), ((0, 0), (1, 0), (1, 1))
    )
]


def ids(cases):
    return ["-".join(map(str, case)) for case in cases]


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_known_by_the_module(case):
    """Checks output and way back with an nnx module (concrete or abstract) and a traced linen model, also under jit."""
    library, rank, inputs, outputs, transposed, option = case
    kernel = kernel_of(library, rank, inputs, outputs, transposed)
    x = RNG.normal(size=(2, *(4,) * rank, inputs)).astype(np.float32)
    wanted = formula(library, kernel, x.astype(np.float64), transposed)

    class Module(nnx.Module):
        def __init__(self):
            self.layer = layer(nnx, rank, outputs, transposed, option, in_features=inputs, rngs=nnx.Rngs(0))

    model = load(library, kernel, nnx.eval_shape(Module))
    close(compiled_nnx(rank, outputs, transposed, option)(*nnx.split(model.layer), x), wanted)
    np.testing.assert_array_equal(save(library, model, kernel), kernel)

    linen = Net(rank, outputs, transposed, option)
    blank = jax.eval_shape(linen.init, jax.random.key(0), x)
    for apply_fn in (linen.apply, jax.jit(linen.apply)):
        options = dict(apply_fn=apply_fn, x=jax.ShapeDtypeStruct(x.shape, x.dtype))
        variables = load(library, kernel, blank, **options)
        close(compiled(rank, outputs, transposed, option)(variables["params"]["layer"]["kernel"], x), wanted)
        np.testing.assert_array_equal(save(library, variables, kernel, **options), kernel)


PLAIN = [case for case in CASES if not case[-1]]


@pytest.mark.parametrize("case", PLAIN, ids=ids(PLAIN))
def test_known_by_the_caller(case):
    library, rank, inputs, outputs, transposed, _ = case
    kernel = kernel_of(library, rank, inputs, outputs, transposed)
    x = RNG.normal(size=(2, *(4,) * rank, inputs)).astype(np.float32)
    linen, said = Net(rank, outputs, transposed), dict(transposed=["layer"] if transposed else [])
    variables = load(library, kernel, jax.eval_shape(linen.init, jax.random.key(0), x), **said)
    loaded = variables["params"]["layer"]["kernel"]
    close(
        compiled(rank, outputs, transposed, False)(loaded, x),
        formula(library, kernel, x.astype(np.float64), transposed),
    )
    np.testing.assert_array_equal(save(library, variables, kernel, **said), kernel)


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
@pytest.mark.parametrize("called", ["layer", None])
def test_known_by_nobody(case, called):
    """Checks that without modules a kernel is right if its shape or Flax's own name tells, and else an error."""
    library, rank, inputs, outputs, transposed, option = case
    kernel = kernel_of(library, rank, inputs, outputs, transposed)
    x = RNG.normal(size=(2, *(4,) * rank, inputs)).astype(np.float32)
    if library == "haiku" and option and called:
        return  # that option changes no shape of Haiku's: from_haiku says that only the module tells it
    linen = Net(rank, outputs, transposed, option, called)
    blank = zoo.trained(jax.eval_shape(linen.init, jax.random.key(0), x))
    (name,) = blank["params"]
    try:
        variables = load(library, kernel, blank, names={name: "layer"})
    except ValueError as error:
        assert "apply_fn=model.apply" in str(error)  # noqa: PT017
        assert inputs == outputs or {inputs, outputs} == {1, 3}, "refused though shapes tell"
        assert name != "Conv_0", "refused though the name tells"
    else:
        loaded = variables["params"][name]["kernel"]
        wanted = formula(library, kernel, x.astype(np.float64), transposed)
        close(compiled(rank, outputs, transposed, option)(loaded, x), wanted)
    if inputs == outputs > 1 and name != "Conv_0":
        with pytest.raises(ValueError, match="fits a convolution as well as a transposed one"):
            save(library, blank, kernel, names={name: "layer"})


@pytest.mark.parametrize("library", FROM)
def test_a_state_of_nnx_says_nothing_of_its_modules(library):
    state = nnx.state(nnx.Dict(layer=layer(nnx, 2, 3, True, in_features=3, rngs=nnx.Rngs(0))))
    kernel = kernel_of(library, 2, 3, 3, True)
    with pytest.raises(ValueError, match="Give the nnx module in place of its state"):
        load(library, kernel, state)
    with pytest.raises(ValueError, match="Give the nnx module in place of its state"):
        TO[library](state)
    known = load(library, kernel, state, transposed=["layer"])
    np.testing.assert_array_equal(TO[library](known, transposed=["layer"])[WORD[library]], kernel)


TREE = {
    "params": {
        "conv": {"kernel": jnp.zeros((3, 3, 2, 4))},
        "deep": {"kernel": jnp.zeros((3, 3, 1, 4))},
        "fc": {"kernel": jnp.zeros((8, 5)), "bias": jnp.zeros(5)},
    }
}
WRONG = [
    (dict(transposed=["cnov"]), r"transposed: \['cnov'\] are no modules .* kernels of convolutions.* mean 'conv'\?"),
    (dict(transposed=["fc"]), r"transposed: \['fc'\] are no modules .*these have .*\['conv', 'deep'\]"),
    (dict(transposed="conv"), r"write \['conv'\]"),
]
FLATTENED = [
    (dict(flattened={"fcc": (2, 2, 2)}), r"flattened: \['fcc'\] are no modules .* dense layers.* mean 'fc'\?"),
    (dict(flattened={"conv": (2, 2, 2)}), r"flattened: \['conv'\] are no modules .*\['fc'\]"),
    (dict(flattened={"fc": (2, 2, 3)}), r"flattened: fc reads 8 inputs, and \(2, 2, 3\)"),
    (dict(flattened={"fc": (-2, -2, 2)}), r"flattened: fc reads 8 inputs"),
    (dict(flattened=["fc"]), r"flattened maps paths"),
]
DEPTHWISE = [
    (dict(depthwise={"deeep": 1}), r"depthwise: \['deeep'\] are no modules .*mean 'deep'\?"),
    (dict(depthwise={"conv": 1}), r"depthwise: \['conv'\] are no modules .*\['deep'\]"),
    (dict(depthwise={"deep": 3}), "must divide its 4 channels; got 3"),
    (dict(depthwise={"deep": 0}), "must divide its 4 channels; got 0"),
    (dict(depthwise={"deep": None}), "must divide its 4 channels; got None"),
    (dict(depthwise=["deep"]), "depthwise maps paths"),
]


@pytest.mark.parametrize(("options", "message"), [*WRONG, *FLATTENED])
def test_options_of_torch_that_name_nothing(options, message):
    for call in (lambda **o: tools.to_torch(TREE, **o), lambda **o: tools.from_torch(tools.to_torch(TREE), TREE, **o)):
        with pytest.raises(ValueError, match=message):
            call(**options)


@pytest.mark.parametrize(("options", "message"), [*WRONG, *DEPTHWISE])
def test_options_of_keras_that_name_nothing(options, message):
    with pytest.raises(ValueError, match=message):
        tools.to_keras(TREE, **options)
    if "transposed" in options:
        with pytest.raises(ValueError, match=message):
            tools.from_keras(tools.to_keras(TREE), TREE, **options)


def test_what_a_module_and_a_caller_say_must_agree():
    model = nnx.Dict(layer=layer(nnx, 2, 4, False, in_features=2, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"transposed: \['layer'\] are no transposed convolutions"):
        tools.to_torch(model, transposed=["layer"])


@pytest.mark.parametrize(
    "make", [lambda rngs: nnx.Linear(3, 3, rngs=rngs), lambda rngs: nnx.Conv(3, 3, (2,), rngs=rngs)]
)
def test_stacked_layers_have_no_counterpart(make):
    """Checks that a stack of dense kernels, whose shape is that of a convolution's, is refused."""
    stacked = nnx.split_rngs(splits=4)(nnx.vmap(lambda rngs: nnx.Dict(layer=make(rngs)), in_axes=0))(nnx.Rngs(0))
    for call in (tools.to_torch, tools.to_keras):
        with pytest.raises(ValueError, match="stacked by vmap or scan"):
            call(stacked)


def test_apply_fn_and_x_go_together():
    linen, x = Net(2, 3, True), jnp.zeros((1, 4, 4, 3))
    variables = linen.init(jax.random.key(0), x)
    for options in (dict(apply_fn=linen.apply), dict(x=x)):
        with pytest.raises(ValueError, match="apply_fn and x go together"):
            tools.to_torch(variables, **options)
    with pytest.raises(ValueError, match="ran no linen module"):
        tools.to_torch(variables, apply_fn=lambda v, x: x, x=x)


if importlib.util.find_spec("torch"):

    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize("wrapped", [False, True])
    def test_known_by_a_torch_module(transposed, wrapped):
        """Checks that a torch module, in place of its state, tells which kernels are transposed."""
        import torch

        net = torch.nn.Sequential()
        net.layer = (torch.nn.ConvTranspose2d if transposed else torch.nn.Conv2d)(3, 3, 2, stride=1 + transposed)
        images = torch.randn(2, 3, 4, 4)
        wanted = net(images).detach().permute(0, 2, 3, 1)
        given = torch.nn.DataParallel(net) if wrapped else net
        linen, x = (
            nn.ConvTranspose(3, (2, 2), (2, 2), "VALID") if transposed else nn.Conv(3, (2, 2), padding="VALID"),
            images.permute(0, 2, 3, 1).numpy(),
        )
        model = nn.Sequential([linen])
        variables = tools.from_torch(given, model.init(jax.random.key(0), x), names={"layers_0": "layer"})
        close(model.apply(variables, x), wanted.numpy())
