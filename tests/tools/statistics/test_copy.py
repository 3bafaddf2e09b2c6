"""Tests reset_stats and copy_stats: what they replace and what they leave, over trees, checkpoints and steps."""

import jax
import numpy as np
import pytest
from flax import nnx

import bnjax
from bnjax import tools
from tests.support import zoo
from tests.tools.statistics.trees import by_role, stats


def test_reset(tree):
    before, after = by_role(tree), by_role(tools.reset_stats(tree))
    assert all((leaf == 0).all() for leaf in after["mean"].values())
    assert all((leaf == 1).all() for leaf in after["var"].values())
    zoo.assert_trees_equal(after["rest"], before["rest"])


def test_copy(tree):
    other = zoo.trained(tree, 7)
    copied = by_role(tools.copy_stats(other, tree))
    for role, source in (("mean", other), ("var", other), ("rest", tree)):
        zoo.assert_trees_equal(copied[role], by_role(source)[role])


def test_copy_from_a_checkpoint(tmp_path):
    _, variables = zoo.linen_net(zoo.Nested)
    restored = zoo.through_orbax(variables, tmp_path)
    zoo.assert_trees_equal(tools.copy_stats(restored, tools.reset_stats(variables)), variables)


def test_copy_from_an_nnx_checkpoint(tmp_path):
    model = zoo.nnx_net(nnx.BatchNorm)
    restored = zoo.through_orbax(nnx.state(model), tmp_path)
    copied = tools.copy_stats(restored, tools.reset_stats(model))
    zoo.assert_trees_equal(nnx.to_pure_dict(nnx.state(copied)), nnx.to_pure_dict(nnx.state(model)))


def test_freeze_named_layers():
    before, after = stats(stem=2, head=2), tools.copy_stats(zoo.trained(stats(stem=2, head=2)), stats(stem=2, head=2))
    kept = jax.jit(lambda b, a: tools.copy_stats(b, a, layers=["stem"]))(before, after)
    zoo.assert_trees_equal(kept, {"stem": before["stem"], "head": after["head"]})


def test_unfreeze_is_the_inverse_of_freeze(tree):
    after = tools.copy_stats(zoo.trained(tree, 8), zoo.trained(tree, 7))
    frozen = tools.copy_stats(tree, after)
    assert not all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(frozen), jax.tree.leaves(after), strict=True))
    zoo.assert_trees_equal(tools.copy_stats(after, frozen), after)


def test_unfreeze_named_layers():
    """Checks that only the named layers are unfrozen, also inside jit."""
    before, after = stats(stem=2, neck=2, head=2), zoo.trained(stats(stem=2, neck=2, head=2))
    thaw = jax.jit(lambda b, a: tools.copy_stats(a, tools.copy_stats(b, a), layers=["head"]))
    zoo.assert_trees_equal(thaw(before, after), {**before, "head": after["head"]})


def linen_steps(thawed):
    """Takes three training steps in linen, with averages frozen unless `thawed`; returns the statistics."""
    model, variables = zoo.linen_net()
    trees = [variables["batch_stats"]]
    for seed, thaw in enumerate(thawed):
        both = {**variables, "batch_stats": trees[-1]}
        after = model.apply(both, zoo.images(seed), train=True, mutable=["batch_stats"])[1]["batch_stats"]
        frozen = tools.copy_stats(trees[-1], after)
        trees.append(tools.copy_stats(after, frozen) if thaw else frozen)
    return trees


def nnx_steps(thawed):
    """Takes three training steps of an nnx module, with averages frozen unless `thawed`; returns the statistics."""
    model = zoo.nnx_net(bnjax.nnx.BatchNorm)
    trees = [nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))]
    for seed, thaw in enumerate(thawed):
        before = nnx.state(nnx.clone(model), nnx.BatchStat)
        model(zoo.images(seed))
        after = nnx.state(model, nnx.BatchStat)
        frozen = tools.copy_stats(before, after)
        nnx.update(model, tools.copy_stats(after, frozen) if thaw else frozen)
        trees.append(nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))
    return trees


@pytest.mark.parametrize("steps", [linen_steps, nnx_steps])
def test_averages_go_on_from_where_they_stood(steps):
    """Checks that frozen averages stay fixed, and that unfrozen ones continue from there."""
    start, still, again, last = steps([False, False, True])
    for tree in (still, again):
        zoo.assert_trees_equal(tree, start)
    assert not any(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(last), jax.tree.leaves(start), strict=True))
    free = steps([True, True, True])
    assert not any(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(last), jax.tree.leaves(free[-1]), strict=True))


def test_selection_errors():
    with pytest.raises(ValueError, match="'stme' fits no layer"):
        tools.copy_stats(stats(stem=2), stats(stem=2), layers=["stme"])
    with pytest.raises(ValueError, match="sequence of patterns"):
        tools.copy_stats(stats(stem=2), stats(stem=2), layers="stem")
    with pytest.raises(ValueError, match="head do not correspond"):
        tools.copy_stats(stats(stem=2), stats(stem=2, head=2))
    with pytest.raises(ValueError, match="holds no batch normalization"):
        tools.copy_stats({}, stats(stem=2))
