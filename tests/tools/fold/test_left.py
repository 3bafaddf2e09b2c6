"""Tests what fold leaves: the reason names what stands in the way, in linen and nnx, and nothing is changed."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import bnjax
from bnjax import tools
from tests.support import zoo
from tests.tools.fold import branches

Norm = functools.partial(bnjax.linen.BatchNorm, use_running_average=True)
ROWS, SIGNAL, IMAGE = (4, 3), (4, 6, 3), (4, 6, 6, 3)


def rounded(kernel):
    """Rounds to 8 bits of the largest, as fake quantization does."""
    step = jnp.max(jnp.abs(kernel)) / 127
    return jnp.round(kernel / step) * step


def straight_through(kernel):
    return kernel + jax.lax.stop_gradient(rounded(kernel) - kernel)


def as_integers(x, kernel, dimensions, **options):
    step = jnp.max(jnp.abs(kernel)) / 127
    return step * jax.lax.dot_general(x, jnp.round(kernel / step).astype(jnp.int8).astype(x.dtype), dimensions)


def product(of_input=lambda x: x, of_kernel=lambda kernel: kernel):
    """Returns a `dot_general` that changes its operands first."""
    return lambda x, kernel, dimensions, **options: jax.lax.dot_general(of_input(x), of_kernel(kernel), dimensions)


class Product(nn.Module):
    """A `dot_general_cls` that rounds the kernel."""

    @nn.compact
    def __call__(self, x, kernel, dimensions, **options):
        return product(of_kernel=rounded)(x, kernel, dimensions)


def convolved(x, kernel, *args, **options):
    return jax.lax.conv_general_dilated(x, rounded(kernel), *args, **options)


def mapped(change):
    return nn.map_variables(nn.Dense, "params", trans_in_fn=functools.partial(jax.tree.map, change), init=True)(4)


def read_again(use):
    """Returns a branch whose kernel is used a second time, by `use(y, kernel)`."""

    def run(x):
        dense = nn.Dense(4, name="dense")
        return use(nn.relu(Norm()(dense(x))), dense.variables["params"]["kernel"])

    return run


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(3)
        return dense(Norm()(dense(x)))


def branched(x):
    norm = Norm()
    y = nn.Dense(4)(x)
    return (
        jax.lax.cond(jnp.sum(y) > 0, lambda y: norm(y), lambda y: 2 * norm(y), y)
        if norm.has_variable("params", "scale")
        else norm(y)
    )


class Louder(bnjax.linen.BatchNorm):
    """A normalization with a __call__ of its own that does not say what it computes."""

    @nn.compact
    def __call__(self, x):
        return 2 * super().__call__(x)


LEFT = {  # branch -> what it runs, the shape of its input, what the reason says
    # a layer that is not linear in the kernel it stores
    "weight_norm": (lambda x: Norm()(nn.WeightNorm(nn.Dense(4))(x)), ROWS, "kernel is not the one that is stored"),
    "weight_norm_conv": (lambda x: Norm()(nn.WeightNorm(nn.Conv(4, (3,)))(x)), SIGNAL, "not the one that is stored"),
    "weight_norm_after": (
        lambda x: nn.WeightNorm(nn.Dense(4))(Norm()(x)),
        ROWS,
        "kernel is not the one that is stored",
    ),
    "spectral_norm": (
        lambda x: Norm()(nn.SpectralNorm(nn.Dense(4))(x, update_stats=False)),
        ROWS,
        "kernel is not the one that is stored",
    ),
    "mapped": (lambda x: Norm()(mapped(jnp.tanh)(x)), ROWS, "kernel is not the one that is stored"),
    "mapped_linearly": (lambda x: Norm()(mapped(lambda a: 2 * a)(x)), ROWS, "kernel is not the one that is stored"),
    "rounded": (lambda x: Norm()(nn.Dense(4, dot_general=product(of_kernel=rounded))(x)), ROWS, "more to its kernel"),
    "straight": (
        lambda x: Norm()(nn.Dense(4, dot_general=product(of_kernel=straight_through))(x)),
        ROWS,
        "more to its kernel",
    ),
    "integers": (lambda x: Norm()(nn.Dense(4, dot_general=as_integers)(x)), ROWS, "more to its kernel"),
    "rounded_class": (lambda x: Norm()(nn.Dense(4, dot_general_cls=Product)(x)), ROWS, "more to its kernel"),
    "rounded_conv": (
        lambda x: Norm()(nn.Conv(4, (3,), conv_general_dilated=convolved)(x)),
        SIGNAL,
        "more to its kernel",
    ),
    "rounded_input": (lambda x: nn.Dense(4, dot_general=product(rounded))(Norm()(x)), ROWS, "more to its input"),
    # a kernel or a layer that something else uses as well
    "tied_decoder": (read_again(lambda y, kernel: y @ kernel.T), ROWS, "kernel is read by transpose as well"),
    "penalty": (read_again(lambda y, kernel: (y, jnp.sum(kernel**2))), ROWS, "kernel is read by"),
    "shared": (lambda x: Shared()(x), ROWS, "called more than once"),
    "branches": (branched, ROWS, "called more than once"),
    "returned": (lambda x: (lambda y: (Norm()(y), y))(nn.Dense(4)(x)), ROWS, "and the output of the model"),
    # zeros that a shift does not reach
    "padded": (lambda x: nn.Conv(4, (3,))(Norm()(x)), SIGNAL, "pads with zeros"),
    "causal": (lambda x: nn.Conv(4, (3,), padding="CAUSAL")(Norm()(x)), SIGNAL, "pads with zeros"),
    "transposed": (
        lambda x: nn.ConvTranspose(4, (3,), (2,), padding="VALID")(Norm()(x)),
        SIGNAL,
        "zeros between the positions",
    ),
    "dilated": (
        lambda x: nn.Conv(4, (3, 3), input_dilation=2, padding=0)(Norm()(x)),
        IMAGE,
        "zeros between the positions",
    ),
    "padded_pool": (
        lambda x: nn.Dense(4)(nn.avg_pool(Norm()(x), (3,), padding="SAME")),
        SIGNAL,
        "average pool in between",
    ),
    "weighted": (lambda x: nn.Dense(4)(Norm()(x) * jnp.arange(6.0).reshape(1, 6, 1)), SIGNAL, "a product in between"),
    "one_of_two_padded": (
        lambda x: (lambda y: nn.Dense(4)(y) + nn.Conv(4, (3,), name="wide")(y))(Norm()(x)),
        SIGNAL,
        "wide, which pads with zeros",
    ),
    "layers_and_a_sum": (
        lambda x: (lambda y: nn.Dense(3)(y) * nn.Dense(3)(y) + y)(Norm()(x)),
        ROWS,
        "Dense_1 and a sum",
    ),
    # what is before and behind, by the name that people know
    "argument": (lambda x: nn.relu(Norm()(x)), ROWS, "its input is an argument of the model"),
    "relu": (lambda x: nn.tanh(Norm()(nn.relu(nn.Dense(4)(x)))), ROWS, "made by relu; its output goes into tanh"),
    "gelu": (lambda x: nn.Dense(4)(nn.gelu(Norm()(x))), ROWS, "its output goes into gelu"),
    "swish": (lambda x: nn.Dense(4)(nn.swish(Norm()(x))), ROWS, "its output goes into s"),  # swish is silu
    "residual": (lambda x: nn.relu(Norm()(nn.Dense(3)(x) + x)), ROWS, "made by a sum"),
    "concatenated": (lambda x: nn.relu(Norm()(jnp.concatenate([nn.Dense(3)(x), x], -1))), ROWS, "made by concatenate"),
    "max_pool": (lambda x: nn.relu(Norm()(nn.max_pool(nn.relu(x), (2,)))), SIGNAL, "made by relu"),
    "mixed": (lambda x: nn.relu(Norm()(nn.Dense(8)(x).reshape(4, -1))), SIGNAL, "a reshape that mixes channels"),
    "general": (lambda x: Norm()(nn.DenseGeneral(4)(x)), ROWS, "made by a DenseGeneral"),
    "general_next": (lambda x: nn.DenseGeneral((4, 2))(Norm()(x)), ROWS, "goes into a DenseGeneral"),
    "layer_norm": (
        lambda x: nn.LayerNorm()(Norm()(nn.LayerNorm()(x))),
        ROWS,
        "by a LayerNorm; its output goes into a LayerNorm",
    ),
    "attention": (lambda x: nn.MultiHeadDotProductAttention(1)(Norm()(x)), SIGNAL, "goes into a DenseGeneral"),
    "product": (lambda x: nn.relu(Norm()(x @ jnp.ones((3, 4)))), ROWS, "made by"),
    # how it is called
    "conditional": (lambda x: Norm(use_scale=False)(nn.Dense(4)(x), scale=jnp.ones(4)), ROWS, "its scale is given"),
    "two_axes": (lambda x: Norm(axis=(1, 2))(nn.Dense(4)(x)), SIGNAL, "several feature axes"),
    "training": (
        lambda x: Norm(use_running_average=False)(nn.Dense(4)(x), update_stats=False),
        ROWS,
        "run the model in evaluation mode",
    ),
    "own": (lambda x: Louder(use_running_average=True)(nn.Dense(4)(x)), ROWS, "Louder overrides __call__"),
}


@pytest.fixture(scope="module")
def folded():
    model, variables, x = branches.linen(
        {n: run for n, (run, *_) in LEFT.items()}, {n: s for n, (_, s, _) in LEFT.items()}
    )
    return variables, tools.fold(model.apply, variables, x)


@pytest.mark.parametrize("name", LEFT)
def test_linen(folded, name):
    (reason,) = [
        why for layer, why in folded[1].left.items() if layer.split("/")[0] == name and "SpectralNorm" not in layer
    ]
    assert LEFT[name][-1] in reason


def test_nothing_is_changed(folded):
    variables, result = folded
    assert result.pairs == ()
    assert result.difference == 0
    zoo.assert_trees_equal(result.stripped, variables)
    zoo.assert_trees_equal(result.variables, variables)


def bn(size, rngs):
    return bnjax.nnx.BatchNorm(size, rngs=rngs)


class TiedDecoder(nnx.Module):
    """A layer whose kernel is read again, transposed."""

    def __init__(self, rngs):
        self.dense, self.norm = nnx.Linear(3, 4, rngs=rngs), bn(4, rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(self.dense(x))) @ self.dense.kernel[...].T


class Tied(nnx.Module):
    """Two layers that share a kernel."""

    def __init__(self, rngs):
        self.one, self.two = nnx.Linear(3, 3, rngs=rngs), nnx.Linear(3, 3, rngs=rngs)
        self.two.kernel = self.one.kernel
        self.norm = bn(3, rngs)

    def __call__(self, x):
        return self.norm(self.one(self.two(x)))


NNX = {
    "weight_norm": (
        lambda r: [nnx.WeightNorm(nnx.Linear(3, 4, rngs=r), rngs=r), bn(4, r)],
        "not the one that is stored",
    ),
    "rounded": (
        lambda r: [nnx.Linear(3, 4, dot_general=product(of_kernel=rounded), rngs=r), bn(4, r)],
        "more to its kernel",
    ),
    "tied_decoder": (lambda r: [TiedDecoder(r)], "kernel is read by transpose as well"),
    "tied": (lambda r: [Tied(r)], "kernel is read by"),
    "lora": (lambda r: [nnx.LoRALinear(3, 4, lora_rank=2, rngs=r), bn(4, r)], "made by a LoRALinear"),
    "general": (lambda r: [nnx.LinearGeneral(3, 4, rngs=r), bn(4, r)], "made by a LinearGeneral"),
    "dilated": (
        lambda r: [lambda x: x[:, None], bn(3, r), nnx.Conv(3, 4, (1,), input_dilation=2, padding=0, rngs=r)],
        "zeros between the positions",
    ),
}


def test_nnx():
    model, x = branches.in_nnx({name: make for name, (make, _) in NNX.items()}, dict.fromkeys(NNX, ROWS))
    result = tools.fold(lambda m, x: m(x), model, x)
    assert result.pairs == ()
    reasons = {layer.split("/")[1]: why for layer, why in result.left.items()}
    assert [name for name, (_, part) in NNX.items() if part not in reasons[name]] == [], reasons


class Wrong(bnjax.linen.BatchNorm):
    """A normalization that says another thing than it does."""

    def evaluation_affine(self, running, scale, bias, epsilon):
        a, c = super().evaluation_affine(running, scale, bias, epsilon)
        return a * 1.0001, c


def test_a_difference_beyond_rounding_is_an_error():
    model = nn.Sequential([nn.Dense(4), Wrong(use_running_average=True)])
    x = branches.inputs({"x": ROWS})["x"]
    variables = zoo.trained(model.init(jax.random.key(1), x))
    with pytest.raises(ValueError, match=r"rounding explains .*'layers_1 into layers_0'"):
        tools.fold(model.apply, variables, x)


def test_max_pool_and_negative_scales():
    model = nn.Sequential([Norm(), lambda x: nn.max_pool(x, (2,), (2,)), nn.Dense(4)])
    x = branches.inputs({"x": SIGNAL})["x"]
    variables = zoo.trained(model.init(jax.random.key(1), x))
    variables["params"]["layers_0"]["scale"] *= jnp.array([1, -1, 1])
    result = tools.fold(model.apply, variables, x)
    assert result.left == {
        "layers_0": "a max-pool stands between it and layers_2, and 1 channels have a negative scale"
    }
