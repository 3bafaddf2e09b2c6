"""Tests fold on whole networks: they agree to 1e-5 without their normalizations, whatever their layers are called."""

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


@pytest.fixture(scope="module")
def mobile():
    """Returns a network with Flax's layers, its variables, an input, and what fold makes of it."""
    model, variables = zoo.linen_net(MobileNet, norm=FlaxNorm)
    return model, variables, zoo.images(), tools.fold(model.apply, variables, zoo.images())


@pytest.mark.slow
def test_a_network(mobile):
    model, variables, x, folded = mobile
    assert (len(folded.pairs), folded.left) == (5, {})
    check(model, variables, x, folded)


@pytest.mark.slow
def test_names_play_no_part():
    model, variables = zoo.linen_net(ResNet)
    x = zoo.images()
    folded = tools.fold(model.apply, variables, x)
    assert {pair.norm: pair.layer for pair in folded.pairs} == {
        "a_norm": "z_conv",
        **{f"n{9 - b}{i}": f"c{b}{4 - i}" for b in range(2) for i in (1, 2, 3)},
        "p1n": "p1c",
    }
    check(model, variables, x, folded)


@pytest.mark.slow
def test_layers_whose_input_others_use():
    model, variables = zoo.linen_net(DenseNet)
    x = zoo.images()
    folded = tools.fold(model.apply, variables, x)
    assert {pair.norm for pair in folded.pairs} == {"BatchNorm_1", "BatchNorm_3"}
    assert folded.left["BatchNorm_0"] == (
        "its input is made by Conv_0, whose output goes into BatchNorm_0 and concatenate; its output goes into relu"
    )
    for name in ("BatchNorm_2", "BatchNorm_4"):
        assert folded.left[name] == "its input is made by concatenate; its output goes into relu"
    check(model, variables, x, folded)


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


def test_stripped_fits_a_network_without_normalization(mobile):
    model, variables, x, folded = mobile
    np.testing.assert_allclose(Plain().apply(folded.stripped, x), model.apply(variables, x), atol=1e-5)


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
    model, x = nn.Sequential([nn.Dense(4), Norm(), nn.Dense(4), Norm()]), zoo.images(rank=2)
    variables = zoo.trained(model.init(jax.random.key(1), x))
    folded = tools.fold(model.apply, flax.core.freeze(variables), x, layers=["layers_1"])
    assert [pair.norm for pair in folded.pairs] == ["layers_1"]
    assert folded.left == {}
    assert isinstance(folded.stripped, flax.core.FrozenDict)
    np.testing.assert_allclose(folded.apply_fn(folded.stripped, x), model.apply(variables, x), atol=1e-5)
    with pytest.raises(ValueError, match="fits no layer"):
        tools.fold(model.apply, variables, x, layers=["layers_9"])
    with pytest.raises(ValueError, match="layers is empty, so no layer is named"):
        tools.fold(model.apply, variables, x, layers=[])
    with pytest.raises(ValueError, match="holds no batch normalization"):
        tools.fold(model.apply, {"params": variables["params"]}, x)
    broken = tools.reset_stats(variables)
    broken["batch_stats"]["layers_1"]["var"] -= 2
    with pytest.raises(ValueError, match="variances not negative; 4 of 4 channels of layers_1"):
        tools.fold(model.apply, broken, x)


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


@pytest.mark.slow
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
