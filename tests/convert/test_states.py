"""Tests the kinds of states and variables that users have: one network gives the same values in each."""

import functools

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import bnjax
from bnjax import tools
from tests.convert.libraries import LIBRARIES, each_library, network
from tests.support import zoo


def everything():
    """Builds a module with each kind of layer whose arrays have another order of axes elsewhere."""
    rngs = nnx.Rngs(0)
    return nnx.Dict(
        up=nnx.ConvTranspose(3, 3, (2, 2), rngs=rngs),
        fc=nnx.Linear(3, 3, rngs=rngs),
        conv=nnx.Conv(3, 4, (2, 2), rngs=rngs),
        bn=bnjax.nnx.BatchNorm(4, rngs=rngs),
    )


@each_library
def test_arrays_of_their_own(library):
    """Checks that arrays are contiguous, writable and share no memory, so that torch.from_numpy takes them."""
    _, to, _ = LIBRARIES[library]
    graph, values = nnx.split(nnx.eval_shape(everything))
    model = nnx.merge(graph, zoo.trained(values))
    before = jax.tree.map(np.array, nnx.state(model))
    state = to(model)
    for name, value in state.items():
        assert value.flags.c_contiguous and value.flags.writeable and value.flags.owndata, name
        value[...] = 7
    zoo.assert_trees_equal(jax.tree.map(np.array, nnx.state(model)), before)


@each_library
def test_variables_do_not_share_memory_with_a_state(library):
    """Checks that changing the state in place does not change the loaded variables."""
    given, to, _ = LIBRARIES[library]
    variables, blank = network()
    state = to(variables)
    loaded = given(state, blank)
    for value in state.values():
        value[...] = 7
    zoo.assert_trees_equal(loaded, variables)


@each_library
def test_dtypes_that_numpy_does_not_have(library):
    """Checks that bfloat16 is converted to float32, which holds it exactly, and back."""
    given, to, _ = LIBRARIES[library]
    variables, blank = (jax.tree.map(lambda a: a.astype(jnp.bfloat16), v) for v in network())
    state = to(variables)
    assert {v.dtype for v in state.values()} <= {np.dtype("f4"), np.dtype("i8")}
    zoo.assert_trees_equal(given(state, blank), variables)
    half = {k: v.astype(ml_dtypes.bfloat16) if v.dtype == "f4" else v for k, v in state.items()}
    zoo.assert_trees_equal(given(half, blank), variables)


@each_library
@pytest.mark.parametrize("shape", [(1, -1), (1, 1, -1), (1, 1, 1, -1)])
def test_statistics_with_axes_of_size_one(library, shape):
    """Checks statistics of shape (1, ..., C), as in the layers of AlgoPerf and Haiku."""
    given, to, _ = LIBRARIES[library]
    variables, blank = network()
    state = to(variables)
    for name in state:
        if name.startswith("BatchNorm") and state[name].ndim == 1:
            state[name] = state[name].reshape(shape)
    zoo.assert_trees_equal(given(state, blank), variables)
    state["BatchNorm_0" + ("/moving_mean" if library == "keras" else ".running_mean")] = np.ones((1, 1, 3))
    with pytest.raises(ValueError, match=r"\(1, 1, 3\).*BatchNorm_0/mean has \(4,\)"):
        given(state, blank)


def test_a_checkpoint_of_another_layer_in_flax():
    """Checks that `copy_stats` takes AlgoPerf's (1, 1, C) into layers of (C,), and refuses other channels."""
    variables, blank = network()
    stats = jax.tree.map(lambda a: a[None, None], variables["batch_stats"])
    copied = tools.copy_stats({"batch_stats": stats}, blank)
    zoo.assert_trees_equal(copied["batch_stats"], variables["batch_stats"])
    with pytest.raises(ValueError, match="do not correspond"):
        tools.copy_stats(jax.tree.map(lambda a: a[..., :1], stats), blank)
    with pytest.raises(ValueError, match="do not correspond"):
        tools.copy_stats(jax.tree.map(lambda a: jnp.concatenate([a, a], 0), stats), blank)


class WithDropout(nnx.Module):
    """A network with state that only Flax has: a random key, and counters of skipped batches."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 3, (3, 3), rngs=rngs)
        self.bn = bnjax.nnx.BatchNorm(3, count_skipped=True, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)


@each_library
@pytest.mark.parametrize("kind", [lambda m: m, nnx.state], ids=["module", "state"])
def test_what_only_flax_has_stays(library, kind):
    given, to, _ = LIBRARIES[library]
    source, target = WithDropout(nnx.Rngs(0)), WithDropout(nnx.Rngs(1))
    target.bn.skipped[...] = 4
    state = to(kind(source))
    assert not any("skipped" in name or "drop" in name for name in state)
    loaded = given(state, kind(target))
    flat = dict(nnx.to_flat_state(nnx.state(loaded) if isinstance(loaded, nnx.Module) else loaded))
    np.testing.assert_array_equal(flat["conv", "kernel"][...], source.conv.kernel[...])
    np.testing.assert_array_equal(flat["bn", "skipped"][...], 4)
    key = lambda variable: jax.random.key_data(variable[...])  # noqa: E731
    np.testing.assert_array_equal(key(flat["drop", "rngs", "key"]), key(target.drop.rngs.key))


@each_library
def test_shapes_are_enough_to_fill(library):
    """Checks loading into the result of `jax.eval_shape` or `nnx.eval_shape` instead of `init`."""
    given, to, _ = LIBRARIES[library]
    model, variables = zoo.linen_net()
    blank = jax.eval_shape(model.init, jax.random.key(0), zoo.images())
    zoo.assert_trees_equal(given(to(variables), blank), variables)
    module = zoo.nnx_net(bnjax.nnx.BatchNorm)
    abstract = nnx.eval_shape(lambda: zoo.NnxNet(bnjax.nnx.BatchNorm, nnx.Rngs(0)))
    zoo.assert_trees_equal(nnx.state(given(to(module), abstract)), nnx.state(module))
    with pytest.raises(ValueError, match=r"drop/rngs/count gets no value"):
        given(to(WithDropout(nnx.Rngs(0))), nnx.eval_shape(lambda: WithDropout(nnx.Rngs(0))))


@functools.cache
def folded_network(kind):
    """Returns a network after fold."""
    if kind == "linen":
        model, variables = zoo.linen_net()
        return tools.fold(model.apply, variables, zoo.images())
    module = zoo.nnx_net(bnjax.nnx.BatchNorm)
    module.eval()
    return tools.fold(lambda m, x: m(x), module, zoo.images())


@each_library
@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_a_folded_network_leaves(library, kind):
    """Checks that a folded network, which has no statistics, converts both ways."""
    folded = folded_network(kind)
    given, to, _ = LIBRARIES[library]
    assert not folded.left
    state = to(folded.stripped)
    assert not any("running" in name or "moving" in name or "batches" in name for name in state)
    assert sum(name.endswith("bias") for name in state) >= 3  # each convolution has one now
    again = given(state, jax.tree.map(jnp.zeros_like, folded.stripped))
    assert type(again) is type(folded.stripped)
    chex.assert_trees_all_equal(jax.tree.leaves(again), jax.tree.leaves(folded.stripped))


@each_library
def test_forgotten_statistics(library):
    """Checks the error for `params` alone, if the network is not folded."""
    given, to, _ = LIBRARIES[library]
    variables, _ = network()
    for call in (to, lambda v: given(to(variables), v)):
        with pytest.raises(ValueError, match=r'BatchNorm_0 must have some: pass both collections, \{"params"'):
            call({"params": variables["params"]})
        with pytest.raises(ValueError, match="nor anything else to convert"):
            call({})
