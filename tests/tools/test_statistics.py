"""Tests merging, resetting, copying and freezing of statistics, against moments of the rows and leaf by leaf."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax
from bnjax import tools
from tests.support import cases, zoo


def linen_tree(freeze=dict):
    return freeze(zoo.linen_net(zoo.Nested)[1])


TREES = {
    "linen": linen_tree,
    "frozen": lambda: linen_tree(flax.core.freeze),
    "batch_stats": lambda: linen_tree()["batch_stats"],
    "nnx_state": lambda: nnx.state(zoo.nnx_net(nnx.BatchNorm)),
    "nnx_stats": lambda: nnx.state(zoo.nnx_net(nnx.BatchNorm), nnx.BatchStat),
    "nnx_pair": lambda: nnx.split(zoo.nnx_net(nnx.BatchNorm), nnx.Param, nnx.BatchStat)[1:],
    "pure_dict": lambda: nnx.to_pure_dict(nnx.state(zoo.nnx_net(nnx.BatchNorm))),
}


def by_role(tree):
    """Returns means, variances and the rest, each as {path: array}."""
    keyed = jax.tree_util.tree_leaves_with_path(tree)
    roles = {"mean": {}, "var": {}, "rest": {}}
    for keys, leaf in keyed:
        path = jax.tree_util.keystr(keys)
        role = next((r for r in ("mean", "var") if f"'{r}'" in path), "rest")
        roles[role][path] = np.asarray(leaf)
    return roles


@pytest.fixture(params=TREES)
def tree(request):
    return TREES[request.param]()


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


def stats(**channels):
    return {layer: {"mean": jnp.zeros(n), "var": jnp.ones(n)} for layer, n in channels.items()}


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


def test_counted_steps():
    """Checks that the counts of plain averages are added by merge, zeroed by reset and copied by copy."""
    norm = bnjax.linen.BatchNorm(use_running_average=False, momentum=None)
    x = jax.random.normal(jax.random.key(0), (4, 8, 3))
    start = norm.init(jax.random.key(1), x[0])

    def after(batches):
        variables = start
        for batch in batches:
            variables = {**variables, **norm.apply(variables, batch, mutable=["batch_stats"])[1]}
        return variables

    parts = [after(x[:1]), after(x[1:])]
    merged = tools.merge_stats(parts, counts=[1, 3])["batch_stats"]
    np.testing.assert_allclose(merged["mean"], np.mean(x, (0, 1)), atol=1e-6)
    np.testing.assert_array_equal(merged["steps"], 4)
    zoo.assert_trees_equal(tools.reset_stats(parts[1]), start)
    zoo.assert_trees_equal(tools.copy_stats(parts[1], start), parts[1])
    assert not any(jax.tree.leaves(tools.decay_mask(parts[1])))


@pytest.mark.parametrize(
    "average",
    [{}, {"momentum": None}, {"momentum": 0.9, "debias": True}, {"momentum": 0.5, "unbiased_var": True}],
    ids=str,
)
def test_moments_applied_are_the_step_of_the_layer(average):
    """Checks that one update from two micro-batches equals a step on all rows, for every kind of average."""
    norm = bnjax.linen.BatchNorm(use_running_average=False, **average)
    x = jax.random.normal(jax.random.key(0), (8, 3)) + 2
    variables = norm.init(jax.random.key(1), x)
    once = norm.apply(variables, x - 1, mutable=["batch_stats"])[1]
    wanted, held = norm.apply({**variables, **once}, x, mutable=["batch_stats"])[1]["batch_stats"], {}
    for part in (x[:3], x[3:]):
        both = {**variables, **once, **held}
        held = norm.apply(both, part, update_stats=False, mutable=["moments"])[1]
    applied = tools.apply_moments(once["batch_stats"], held["moments"], **average)
    assert applied.keys() == wanted.keys()
    for role, value in applied.items():
        cases.assert_close(value, wanted[role], 20 * cases.unit("float32"), 10, role)


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


@pytest.mark.parametrize("norm", zoo.LINEN_NORMS)
@pytest.mark.parametrize("jitted_first", [False, True])
def test_frozen_norms(norm, jitted_first):
    """Checks evaluation inside the context and training outside it, whatever jit has cached before."""
    model, variables = zoo.linen_net(norm=norm)
    train = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))
    x = zoo.images(3)
    if jitted_first:
        train(variables, x)
    with tools.frozen_norms():
        y, updates = train(variables, x)
    np.testing.assert_allclose(y, model.apply(variables, x), rtol=1e-5, atol=1e-5)
    zoo.assert_trees_equal(updates["batch_stats"], variables["batch_stats"])
    with tools.frozen_norms(layers=["BatchNorm_0"]):
        _, some = train(variables, x)
    _, none = train(variables, x)
    zoo.assert_trees_equal(some["batch_stats"]["BatchNorm_0"], variables["batch_stats"]["BatchNorm_0"])
    for thawed in (some["batch_stats"]["BatchNorm_1"], none["batch_stats"]["BatchNorm_0"]):
        assert not any(
            np.array_equal(a, b) for a in thawed.values() for b in variables["batch_stats"]["BatchNorm_0"].values()
        )
    with pytest.raises(ValueError, match="sequence of patterns"), tools.frozen_norms("BatchNorm_0"):
        pass


def test_frozen_norms_inside_scan_and_vmap():
    model, variables = zoo.linen_net(zoo.Nested)
    x = zoo.images()
    with tools.frozen_norms():
        y, updates = model.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(y, model.apply(variables, x), rtol=1e-5, atol=1e-5)
    zoo.assert_trees_equal(updates["batch_stats"], variables["batch_stats"])
