"""Tests fold: networks agree to 1e-5 without their normalizations; what cannot be folded stays, with the reason."""

import functools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax
from bnjax import tools
from tests.support import zoo

pytestmark = pytest.mark.slow  # whole networks, traced and compiled many times

Norm = functools.partial(bnjax.linen.BatchNorm, use_running_average=True)
FlaxNorm = functools.partial(nn.BatchNorm, use_running_average=True)
Conv = functools.partial(nn.Conv, use_bias=False)


class ResNet(nn.Module):
    """Bottleneck blocks, one with a projection, in a scrambled order of names."""

    norm: type = Norm

    @nn.compact
    def __call__(self, x):
        x = nn.relu(self.norm(name="a_norm")(Conv(8, (3, 3), name="z_conv")(x)))
        for block, (width, stride) in enumerate([(8, 1), (12, 2)]):
            y = nn.relu(self.norm(name=f"n{9 - block}1")(Conv(4, (1, 1), name=f"c{block}3")(x)))
            y = nn.relu(self.norm(name=f"n{9 - block}2")(Conv(4, (3, 3), stride, name=f"c{block}2")(y)))
            y = self.norm(name=f"n{9 - block}3", scale_init=nn.initializers.zeros)(
                Conv(width, (1, 1), name=f"c{block}1")(y)
            )
            if x.shape != y.shape:
                x = self.norm(name=f"p{block}n")(Conv(width, (1, 1), stride, name=f"p{block}c")(x))
            x = nn.relu(x + y)
        return nn.Dense(5)(x.mean((1, 2)))


class MobileNet(nn.Module):
    """Inverted residual: expand, depthwise, project; a grouped convolution; biases here and there."""

    norm: type = Norm

    @nn.compact
    def __call__(self, x):
        x = nn.relu6(self.norm()(Conv(8, (3, 3), 2)(x)))
        y = nn.relu6(self.norm()(nn.Conv(16, (1, 1))(x)))
        y = nn.relu6(self.norm()(Conv(16, (3, 3), feature_group_count=16)(y)))
        x = x + self.norm()(Conv(8, (1, 1))(y))
        x = nn.relu6(self.norm()(nn.Conv(12, (3, 3), feature_group_count=4)(x)))
        return nn.Dense(5)(x.mean((1, 2)))


class DenseNet(nn.Module):
    """BN-ReLU-conv blocks: the first norm's input is used by other layers too, so only the second can be folded."""

    norm: type = Norm

    @nn.compact
    def __call__(self, x):
        x = Conv(6, (3, 3))(x)
        for _ in range(2):
            y = Conv(8, (1, 1))(nn.relu(self.norm()(x)))
            y = Conv(4, (3, 3))(nn.relu(self.norm()(y)))
            x = jnp.concatenate([x, y], -1)
        return nn.Dense(5)(nn.relu(self.norm()(x)).mean((1, 2)))


def check(model, variables, x, folded, atol=1e-5):
    """Asserts that both forms agree with the model, and that the folded norms are neither computed nor stored."""
    y = model.apply(variables, x)
    largest = np.abs(y).max()
    for other in (model.apply(folded.variables, x), folded.apply_fn(folded.stripped, x)):
        np.testing.assert_allclose(other, y, atol=atol * largest, rtol=0)
    assert folded.difference <= atol
    assert jax.tree.structure(folded.variables) == jax.tree.structure(variables)
    roots = str(jax.make_jaxpr(folded.apply_fn)(folded.stripped, x)).count("rsqrt")
    assert roots == len(folded.left)
    names = {"/".join(p[1:-1]) for p in flax.traverse_util.flatten_dict(flax.core.unfreeze(folded.stripped))}
    assert not names & {pair.norm for pair in folded.pairs}
    assert set(folded.left) <= names


@pytest.mark.parametrize("norm", [Norm, FlaxNorm])
@pytest.mark.parametrize(("net", "pairs", "left"), [(ResNet, 8, 0), (MobileNet, 5, 0), (DenseNet, 2, 3)])
def test_networks(net, pairs, left, norm):
    model, variables = zoo.linen_net(net, norm=norm)
    folded = tools.fold(model.apply, variables, zoo.images())
    assert (len(folded.pairs), len(folded.left)) == (pairs, left)
    assert all(pair.side == "previous" for pair in folded.pairs)
    check(model, variables, zoo.images(), folded)


def test_names_play_no_part():
    model, variables = zoo.linen_net(ResNet)
    pairs = {pair.norm: pair.layer for pair in tools.fold(model.apply, variables, zoo.images()).pairs}
    assert pairs == {
        "a_norm": "z_conv",
        **{f"n{9 - b}{i}": f"c{b}{4 - i}" for b in range(2) for i in (1, 2, 3)},
        "p1n": "p1c",
    }


def test_reasons():
    model, variables = zoo.linen_net(DenseNet)
    folded = tools.fold(model.apply, variables, zoo.images())
    assert "used by something else as well" in folded.left["BatchNorm_0"]
    assert "made by concatenate" in folded.left["BatchNorm_4"]
    assert all("its output goes into no convolution or dense layer alone" in r for r in folded.left.values())


class Plain(nn.Module):
    """The MobileNet of this file without normalization, as a user may write it: `stripped` must fit it."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu6(nn.Conv(8, (3, 3), 2)(x))
        y = nn.relu6(nn.Conv(16, (1, 1))(x))
        y = nn.relu6(nn.Conv(16, (3, 3), feature_group_count=16)(y))
        x = x + nn.Conv(8, (1, 1))(y)
        x = nn.relu6(nn.Conv(12, (3, 3), feature_group_count=4)(x))
        return nn.Dense(5)(x.mean((1, 2)))


def test_stripped_fits_a_network_without_normalization():
    model, variables = zoo.linen_net(MobileNet)
    x = zoo.images()
    folded = tools.fold(model.apply, variables, x)
    assert set(folded.stripped) == {"params"}
    np.testing.assert_allclose(Plain().apply(folded.stripped, x), model.apply(variables, x), atol=1e-5)


def sequence(*layers):
    return nn.Sequential(layers)


PAIRS = {  # layers, input rank, side of the fold
    "dense": (lambda: [nn.Dense(4), Norm()], 2, "previous"),
    "dense_no_bias": (lambda: [nn.Dense(4, use_bias=False), Norm()], 2, "previous"),
    "conv_1d": (lambda: [nn.Conv(4, (3,)), Norm()], 3, "previous"),
    "conv_3d": (lambda: [nn.Conv(4, (2, 2, 2)), Norm()], 5, "previous"),
    "dilated": (lambda: [nn.Conv(4, (3, 3), kernel_dilation=2, padding="VALID"), Norm()], 4, "previous"),
    "grouped": (lambda: [nn.Conv(12, (3, 3), feature_group_count=3), Norm()], 4, "previous"),
    "transposed": (lambda: [nn.ConvTranspose(4, (3, 3), (2, 2)), Norm()], 4, "previous"),
    "transposed_no_bias": (lambda: [nn.ConvTranspose(4, (3, 3), use_bias=False), Norm()], 4, "previous"),
    "transposed_kernel": (lambda: [nn.ConvTranspose(4, (3, 3), transpose_kernel=True), Norm()], 4, "previous"),
    "no_scale": (lambda: [nn.Dense(4), Norm(use_scale=False)], 2, "previous"),
    "no_affine": (lambda: [nn.Dense(4, use_bias=False), Norm(use_scale=False, use_bias=False)], 2, "previous"),
    "offset": (lambda: [nn.Dense(4), Norm(scale_offset=1.0)], 2, "previous"),
    "epsilon": (lambda: [nn.Dense(4), Norm(epsilon=0.1)], 2, "previous"),
    "before_dense": (lambda: [Norm(), nn.Dense(4)], 2, "next"),
    "before_dense_no_bias": (lambda: [Norm(), nn.Dense(4, use_bias=False)], 2, "next"),
    "before_valid": (lambda: [Norm(), nn.Conv(4, (3, 3), padding="VALID")], 4, "next"),
    "before_pointwise": (lambda: [Norm(), nn.Conv(4, (1, 1), strides=2)], 4, "next"),
    "before_circular": (lambda: [Norm(), nn.Conv(4, (3, 3), padding="CIRCULAR")], 4, "next"),
    "before_grouped": (lambda: [Norm(), nn.Conv(12, (3, 3), padding=0, feature_group_count=3)], 4, "next"),
    "before_no_affine": (lambda: [Norm(use_scale=False, use_bias=False), nn.Dense(4)], 2, "next"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name):
    layers, rank, side = PAIRS[name]
    model, x = sequence(*layers()), zoo.images(size=5, rank=rank)
    variables = zoo.trained(model.init(jax.random.key(1), x))
    folded = tools.fold(model.apply, variables, x)
    assert [pair.side for pair in folded.pairs] == [side]
    check(model, variables, x, folded)


def test_both_sides_of_one_layer():
    """Checks BN → Dense → BN: the dense layer absorbs the norm before it and the one after it."""
    model = sequence(Norm(), nn.Dense(4), Norm(), nn.relu)
    x = jax.random.normal(jax.random.key(0), (8, 3))
    variables = zoo.trained(model.init(jax.random.key(1), x))
    folded = tools.fold(model.apply, variables, x)
    assert [pair.side for pair in folded.pairs] == ["next", "previous"]
    check(model, variables, x, folded)


def test_channels_of_scale_zero():
    """Checks that channels with scale zero fold without a division by zero."""
    for layers in ([nn.Dense(4), Norm()], [Norm(), nn.Dense(4)], [Norm(), nn.Dense(4, use_bias=False)]):
        model = sequence(*layers)
        x = jax.random.normal(jax.random.key(0), (8, 3))
        variables = zoo.trained(model.init(jax.random.key(1), x))
        name = next(k for k, v in variables["params"].items() if "scale" in v)
        variables["params"][name]["scale"] = variables["params"][name]["scale"].at[1].set(0.0)
        check(model, variables, x, tools.fold(model.apply, variables, x))


class Returned(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.Dense(4)(x)
        return Norm()(y), y


class Unused(nn.Module):
    """A network in which a value is computed and never used, which must not count as a use."""

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(4)(x)
        jnp.sum(y)
        return jax.checkpoint(nn.relu)(Norm()(jax.jit(lambda y: y.astype(jnp.float32))(y)))


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(3)
        return dense(Norm()(dense(x)))


class Conditional(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Norm(use_scale=False)(nn.Dense(4)(x), scale=jnp.ones(4))


class Projected(nn.Module):
    """A matrix product without a layer, into which nothing can be folded."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.ones, (3, 4))
        return nn.relu(Norm()(x @ w))


class Louder(bnjax.linen.BatchNorm):
    """A user's own normalization."""


class Standardized(nn.Conv):
    """A convolution that may transform its kernel first."""


LEFT = {
    "returned": (Returned, "used by something else as well: input of BatchNorm_0 (call 1), the output"),
    "shared": (Shared, "called repeatedly"),
    "conditional": (Conditional, "given at the call"),
    "variant": (lambda: sequence(nn.Dense(4), Louder(use_running_average=True)), "it is a Louder, which may do more"),
    "matmul": (Projected, "made by dot_general"),
    "subclass": (lambda: sequence(Standardized(4, (1,)), Norm()), "made by"),
    "relu": (lambda: sequence(nn.Dense(4), nn.relu, Norm()), "made by max"),
    "axis": (lambda: sequence(nn.Dense(4), Norm(axis=-2)), "feature axis -2 is not the last"),
    "argument": (lambda: sequence(Norm(), nn.relu), "an argument of the model"),
    "padded": (lambda: sequence(Norm(), nn.Conv(4, (3,))), "pads with zeros"),
    "transposed": (lambda: sequence(Norm(), nn.ConvTranspose(4, (3,))), "zeros between the positions"),
    "training": (lambda: sequence(nn.Dense(4), Norm(use_running_average=False, momentum=1.0)), "evaluation mode"),
}


@pytest.mark.parametrize("name", LEFT)
def test_left(name):
    make, reason = LEFT[name]
    model, x = make(), jax.random.normal(jax.random.key(0), (4, 6, 3))
    variables = zoo.trained(model.init(jax.random.key(1), x))

    def apply_fn(variables, x):
        return model.apply(variables, x, mutable=["batch_stats"])[0]

    folded = tools.fold(apply_fn, variables, x)
    assert folded.pairs == ()
    assert reason in next(iter(folded.left.values()))
    zoo.assert_trees_equal(folded.stripped, variables)
    assert folded.difference == 0


def test_dead_code_is_no_use():
    model, x = Unused(), jax.random.normal(jax.random.key(0), (4, 3))
    variables = zoo.trained(model.init(jax.random.key(1), x))
    folded = tools.fold(model.apply, variables, x)
    assert len(folded.pairs) == 1
    check(model, variables, x, folded)


@pytest.mark.parametrize("before", [True, False])
def test_what_follows_inside_a_normalization_is_kept(before):
    """Checks that norms with residual and activation fold into the layer before them, never into the one after."""

    class Ending(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.Dense(3)(x) if before else x
            return nn.Dense(4)(Norm(activation=nn.relu)(y, residual=x))

    model, x = Ending(), jax.random.normal(jax.random.key(0), (8, 3))
    variables = zoo.trained(model.init(jax.random.key(1), x))
    folded = tools.fold(model.apply, variables, x)
    assert [pair.side for pair in folded.pairs] == (["previous"] if before else [])
    assert before or "a residual or an activation stands in between" in folded.left["BatchNorm_0"]
    check(model, variables, x, folded)


class Stacked(nn.Module):
    @nn.compact
    def __call__(self, x):
        axes = dict(variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True})
        return nn.scan(StackedBlock, length=3, **axes)()(x, None)[0]


class StackedBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = nn.relu(Norm()(nn.Conv(6, (3,), use_bias=False)(x)))
        return nn.Dense(3)(nn.remat(Norm)()(x)), None


def test_layers_stacked_by_scan():
    model, x = Stacked(), jax.random.normal(jax.random.key(0), (4, 6, 3))
    variables = zoo.trained(model.init(jax.random.key(1), x))
    folded = tools.fold(model.apply, variables, x)
    assert {pair.side for pair in folded.pairs} == {"previous", "next"}
    check(model, variables, x, folded)


def test_chosen_layers_and_errors():
    model, variables = zoo.linen_net(MobileNet)
    folded = tools.fold(model.apply, variables, zoo.images(), layers=["BatchNorm_0"])
    assert [pair.norm for pair in folded.pairs] == ["BatchNorm_0"]
    np.testing.assert_allclose(
        folded.apply_fn(folded.stripped, zoo.images()), model.apply(variables, zoo.images()), atol=1e-5
    )
    with pytest.raises(ValueError, match="fits no layer"):
        tools.fold(model.apply, variables, zoo.images(), layers=["BatchNorm_9"])
    with pytest.raises(ValueError, match="holds no batch normalization"):
        tools.fold(model.apply, {"params": variables["params"]}, zoo.images())


def test_frozen_and_restored(tmp_path):
    model, variables = zoo.linen_net(MobileNet)
    x = zoo.images()
    frozen = tools.fold(model.apply, flax.core.freeze(variables), x)
    assert isinstance(frozen.stripped, flax.core.FrozenDict)
    restored = zoo.through_orbax(variables, tmp_path)
    folded = tools.fold(model.apply, restored, x)
    zoo.assert_trees_equal(flax.core.unfreeze(frozen.stripped), folded.stripped)
    check(model, restored, x, folded)


def test_half_precision_keeps_the_dtypes():
    model = sequence(nn.Conv(4, (3, 3), dtype=jnp.bfloat16), Norm(dtype=jnp.float32), nn.relu)
    x = zoo.images()
    variables = zoo.trained(model.init(jax.random.key(0), x))
    folded = tools.fold(model.apply, variables, x)
    y = folded.apply_fn(folded.stripped, x)
    assert y.dtype == model.apply(variables, x).dtype == jnp.float32
    # folding rounds the scaled kernel, the product and the bias to bfloat16, at other places than the model
    assert folded.difference < 4 * float(jnp.finfo(jnp.bfloat16).eps)


class NnxMobileNet(nnx.Module):
    def __init__(self, norm, rngs):
        conv = functools.partial(nnx.Conv, rngs=rngs)
        self.stem = conv(3, 8, (3, 3), use_bias=False)
        self.convs = nnx.List(
            [conv(8, 16, (1, 1)), conv(16, 16, (3, 3), feature_group_count=16, use_bias=False), conv(16, 8, (1, 1))]
        )
        self.norms = nnx.List([norm(n, rngs=rngs) for n in (8, 16, 16, 8)])
        self.up = nnx.ConvTranspose(8, 4, (2, 2), (2, 2), rngs=rngs)
        self.up_norm, self.head_norm = norm(4, rngs=rngs), norm(4, rngs=rngs)
        self.head = nnx.Linear(4, 5, rngs=rngs)

    def __call__(self, x):
        x = y = nnx.relu(self.norms[0](self.stem(x)))
        for conv, norm in zip(self.convs, list(self.norms)[1:], strict=True):
            y = nnx.relu(norm(conv(y)))
        y = nnx.relu(self.up_norm(self.up(x + y)))
        return self.head(self.head_norm(y.mean((1, 2))))


@pytest.mark.parametrize("norm", zoo.nnx_norms())
def test_nnx(norm):
    model = NnxMobileNet(norm, nnx.Rngs(0))
    graph, state = nnx.split(model)
    model = nnx.merge(graph, zoo.trained(state))
    model.eval()
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    x = zoo.images()
    y = model(x)
    folded = tools.fold(lambda m, x: m(x), model, x)
    assert len(folded.pairs) == 6
    assert folded.left == {}
    for other in (folded.variables, folded.stripped):
        np.testing.assert_allclose(other(x), y, atol=1e-5 * float(jnp.abs(y).max()), rtol=0)
    assert folded.difference <= 1e-5
    zoo.assert_trees_equal(nnx.to_pure_dict(nnx.state(model)), before)
    assert not jax.tree.leaves(nnx.state(folded.stripped, nnx.BatchStat))
    graph, state = nnx.split(folded.stripped)
    assert "rsqrt" not in str(jax.make_jaxpr(lambda state, x: nnx.merge(graph, state)(x))(state, x))
    folded.stripped.eval()
    np.testing.assert_array_equal(folded.stripped(x), folded.apply_fn(folded.stripped, x))


def test_nnx_shared_kernels_are_left():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.one, self.two = nnx.Linear(3, 3, rngs=rngs), nnx.Linear(3, 3, rngs=rngs)
            self.two.kernel = self.one.kernel
            self.norm = bnjax.nnx.BatchNorm(3, rngs=rngs, use_running_average=True)

        def __call__(self, x):
            return self.norm(self.one(self.two(x)))

    folded = tools.fold(lambda m, x: m(x), Tied(nnx.Rngs(0)), jnp.ones((2, 3)))
    assert folded.pairs == ()
    assert "shared" in folded.left["norm"]
