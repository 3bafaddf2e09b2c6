"""Tests merge_stats: the merged statistics are those of all the rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax
from bnjax import tools
from tests.support import cases, zoo
from tests.tools.statistics.trees import by_role, linen_tree, stats


def test_merge_is_that_of_the_rows(tree):
    """Checks that merging statistics of disjoint rows gives the statistics of all rows."""
    rng = np.random.default_rng(0)
    counts = [3, 0, 8, 5]

    def rows(leaf):
        return [rng.normal(size=(n, *leaf.shape)) + rng.normal() for n in counts]

    structure = jax.tree.structure(tree)
    data = {path: rows(leaf) for path, leaf in by_role(tree)["mean"].items()}

    def part(i):
        def leaf(keys, leaf):
            path = jax.tree_util.keystr(keys)
            x = data.get(path.replace("'var'", "'mean'"))
            if x is None:
                return leaf
            with np.errstate(all="ignore"):
                value = np.nan if len(x[i]) == 0 else (x[i].var(0) if "'var'" in path else x[i].mean(0))
            return jnp.full(leaf.shape, value, jnp.float32)

        return jax.tree_util.tree_map_with_path(leaf, tree)

    merged = tools.merge_stats([part(i) for i in range(len(counts))], counts=counts)
    roles = by_role(merged)
    assert jax.tree.structure(merged) == structure
    assert len(roles["mean"]) == len(data) > 0
    for path, x in data.items():
        x = np.concatenate(x)
        # parts are rounded to float32 once each, and a merge of k parts is about 4k operations
        tolerance = (4 * len(counts) + 2) * cases.unit("float32")
        magnitude = np.abs(x).max() ** 2 + 1
        cases.assert_close(roles["mean"][path], x.mean(0), tolerance, magnitude)
        cases.assert_close(roles["var"][path.replace("'mean'", "'var'")], x.var(0), tolerance, magnitude)
    for path, leaf in roles["rest"].items():
        np.testing.assert_array_equal(leaf, by_role(tree)["rest"][path])


def test_merge_of_an_axis_is_that_of_a_list(tree):
    parts = [zoo.trained(tree, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    listed, along = (by_role(t) for t in (tools.merge_stats(parts), tools.merge_stats(stacked, axis=0)))
    for role in ("mean", "var"):
        for path, leaf in listed[role].items():
            np.testing.assert_array_equal(leaf, along[role][path])


def test_merge_of_replicas_is_the_global_batch():
    """Checks statistics per replica after a step of momentum 0, as pmap without axis_name leaves them."""
    x = jax.random.normal(jax.random.key(0), (8, 16, 3)) + jnp.arange(8.0)[:, None, None]
    norm = bnjax.linen.BatchNorm(use_running_average=False, momentum=0.0)
    variables = norm.init(jax.random.key(1), x[0])
    replicas = jax.vmap(lambda x: norm.apply(variables, x, mutable=["batch_stats"])[1])(x)
    merged = tools.merge_stats(replicas, axis=0)["batch_stats"]
    wanted = np.asarray(x, np.float64).reshape(-1, 3)
    tolerance = 40 * cases.unit("float32")
    cases.assert_close(merged["mean"], wanted.mean(0), tolerance, 8)
    cases.assert_close(merged["var"], wanted.var(0), tolerance, 64)


def test_merge_in_half_precision_keeps_the_dtype():
    parts = [{"mean": jnp.full(2, m, jnp.bfloat16), "var": jnp.ones(2, jnp.bfloat16)} for m in (-1, 1)]
    merged = tools.merge_stats(parts)
    assert merged["var"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged["var"].astype(np.float32), 2.0)


def test_merge_under_jit():
    parts = [zoo.trained(linen_tree(), seed) for seed in (1, 2)]
    jitted, plain = jax.jit(lambda *p: tools.merge_stats(p))(*parts), tools.merge_stats(parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), jitted, plain)


def test_merge_on_a_nnx_module_leaves_it_alone():
    model = zoo.nnx_net(nnx.BatchNorm)
    before = nnx.to_pure_dict(nnx.state(model))
    other = zoo.trained(nnx.state(model), 5)
    merged = tools.merge_stats([model, tools.copy_stats(other, model)])
    assert isinstance(merged, zoo.NnxNet)
    zoo.assert_trees_equal(nnx.to_pure_dict(nnx.state(model)), before)
    wanted = tools.merge_stats([nnx.state(model), other])
    zoo.assert_trees_equal(
        nnx.to_pure_dict(nnx.state(merged, nnx.BatchStat)),
        nnx.to_pure_dict(nnx.filter_state(wanted, nnx.BatchStat)),
    )


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        ([], {}, "non-empty sequence"),
        (stats(a=2), {}, "non-empty sequence"),
        ([{"dense": {"kernel": jnp.ones(2)}}], {}, "holds no batch normalization"),
        ([stats(a=2), stats(a=3)], {}, r"a do not correspond: \(2,\) in one tree, \(3,\)"),
        ([stats(a=2), stats(a=2, b=2)], {}, "b do not correspond: none"),
        ([stats(a=2)] * 2, {"counts": [1, 2, 3]}, "counts must be 2"),
        ([stats(a=2)] * 2, {"counts": [0, 0]}, "not all zero"),
        ([stats(a=2)] * 2, {"counts": [-1, 2]}, "non-negative"),
        (stats(a=2), {"axis": 0}, "besides the channels"),
        ({**stats(a=(2, 3)), **stats(b=(4, 3))}, {"axis": 0}, "same parts in every layer"),
    ],
)
def test_merge_errors(parts, options, message):
    with pytest.raises(ValueError, match=message):
        tools.merge_stats(parts, **options)
