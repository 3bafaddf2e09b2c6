"""Tests bnjax.linen.BatchNorm under every linen transformation: statistics take exactly one step per call."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
from tests.support import oracle
from tests.support.cases import assert_close, unit

C, ROWS = 4, 12
TOL = 30 * unit("float32")
BATCH_STATS = ["batch_stats"]


def batch(*lead, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(*lead, ROWS, C)), jnp.float32) + 0.5


def norm(**fields):
    return bnjax.linen.BatchNorm(**{"use_running_average": False} | fields)


def check_updates(stats, *xs):
    """Asserts that mean and var are those after one step for each of xs, in order."""
    running = np.zeros(C), np.ones(C)
    for x in xs:
        running = oracle.update_running(running, oracle.statistics(np.asarray(x), (1,)), 0.99)
    for name, want in zip(("mean", "var"), running, strict=True):
        assert_close(stats[name], want, TOL, what=name)


def apply_once(module, x, *args):
    """Initializes and calls a module with one layer; returns y and the statistics."""
    variables = module.init(jax.random.key(0), x, *args)
    y, updates = module.apply(variables, x, *args, mutable=BATCH_STATS)
    return y, updates["batch_stats"]


def xhat(x):
    x = np.asarray(x, np.float64)
    return oracle.batch_norm(x, np.ones(C), np.zeros(C), 0 * x, (1,)).y


def only(tree):
    """Returns the mean and var of a tree with one layer in it."""
    while "mean" not in tree:
        (tree,) = tree.values()
    return tree


# The interface


def test_arguments_of_the_call_are_those_of_flax_first():
    theirs, mine = (list(inspect.signature(c.__call__).parameters.values()) for c in (nn.BatchNorm, bnjax.BatchNorm))
    for a, b in zip(mine, theirs, strict=False):
        assert (a.name, a.kind, a.default) == (b.name, b.kind, b.default)
    assert all(p.kind == p.KEYWORD_ONLY for p in mine[len(theirs) :])


def test_the_name_of_class_and_variables():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return bnjax.BatchNorm(use_running_average=False)(bnjax.BatchNorm(use_running_average=False)(x))

    variables = Net().init(jax.random.key(0), batch())
    assert set(variables["batch_stats"]) == {"BatchNorm_0", "BatchNorm_1"}
    assert jax.tree.map(jnp.shape, variables["params"]["BatchNorm_0"]) == dict(scale=(C,), bias=(C,))


# init


@pytest.mark.parametrize(
    "fields", [{}, dict(momentum=None), dict(axis_name="data"), dict(axis_name=("a", "b"))], ids=str
)
@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize("running", [False, True])
def test_init_updates_nothing_needs_no_axis_and_takes_one_row(fields, rows, running):
    module = norm(**fields, use_running_average=running)
    stats = module.init(jax.random.key(0), batch()[:rows])["batch_stats"]
    starts = dict(mean=np.zeros(C), var=np.ones(C)) | (dict(steps=np.zeros(C)) if "momentum" in fields else {})
    assert set(stats) == set(starts)
    for name, want in starts.items():
        np.testing.assert_array_equal(stats[name], want)


def test_init_with_index_groups_and_under_jit_and_eval_shape():
    module = norm(axis_name="data", axis_index_groups=[[0, 1], [2, 3]])
    shapes = jax.eval_shape(module.init, jax.random.key(0), batch())
    made = jax.jit(module.init)(jax.random.key(0), batch())
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(lambda s: s.shape, shapes)


def test_init_of_nan_starts_clean():
    stats = norm().init(jax.random.key(0), jnp.full((ROWS, C), jnp.nan))["batch_stats"]
    np.testing.assert_array_equal(stats["mean"], np.zeros(C))


# Uses of the layer that Flax's own tests have


def test_rank_one_input():
    """Checks an input with one row per channel, as in Flax's tests: y is the bias."""
    x = batch()[0]
    y, stats = apply_once(norm(), x)
    np.testing.assert_array_equal(y, np.zeros(C))
    check_updates(stats, x[None])


def test_a_reused_layer_steps_once_for_each_call_in_order():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = norm()
            return layer(layer(x) * 3 + 1)

    x = batch()
    y, stats = apply_once(Net(), x)
    first = xhat(x) * 3 + 1
    check_updates(only(stats), x, first)
    assert_close(y, xhat(first), TOL)


# Transformations


@pytest.mark.parametrize("wrap", [nn.jit, nn.remat, nn.checkpoint], ids=["jit", "remat", "checkpoint"])
@pytest.mark.parametrize("differentiate", [False, True])
def test_jit_and_remat(wrap, differentiate):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return wrap(bnjax.linen.BatchNorm)(use_running_average=False)(x)

    x, module = batch(), Net()
    variables = module.init(jax.random.key(0), x)

    def loss(params):
        y, updates = module.apply({**variables, "params": params}, x, mutable=BATCH_STATS)
        return jnp.sum(y**3), updates

    step = jax.grad(loss, has_aux=True) if differentiate else loss
    check_updates(only(step(variables["params"])[1]["batch_stats"]), x)


def test_remat_gives_the_gradient_of_the_plain_layer():
    x, h = batch(), batch(seed=1)
    plain, remat = norm(), nn.remat(bnjax.linen.BatchNorm)(use_running_average=False)
    variables = plain.init(jax.random.key(0), x)

    def grads(module):
        return jax.grad(lambda x: jnp.sum(module.apply(variables, x, mutable=BATCH_STATS)[0] * h))(x)

    assert_close(grads(remat), grads(plain), TOL)


VMAP = dict(variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, in_axes=0, out_axes=0)


def test_vmap_with_own_statistics():
    x = batch(3)
    y, stats = apply_once(nn.vmap(bnjax.linen.BatchNorm, **VMAP)(use_running_average=False), x)
    for i in range(3):
        check_updates({k: v[i] for k, v in stats.items()}, x[i])
        assert_close(y[i], xhat(x[i]), TOL)


def test_vmap_nested():
    x = batch(2, 3)
    twice = nn.vmap(nn.vmap(bnjax.linen.BatchNorm, **VMAP), **VMAP)
    _, stats = apply_once(twice(use_running_average=False), x)
    assert stats["mean"].shape == (2, 3, C)
    for i in range(2):
        for j in range(3):
            check_updates({k: v[i, j] for k, v in stats.items()}, x[i, j])


def test_vmap_with_shared_statistics_and_an_axis_name():
    """Checks that statistics pooled over the mapped axis are equal along it, so that they can be stored once."""
    x = batch(3)
    shared = dict(variable_axes={"params": None, "batch_stats": None}, split_rngs={"params": False}, axis_name="data")
    y, stats = apply_once(nn.vmap(bnjax.linen.BatchNorm, **shared)(use_running_average=False, axis_name="data"), x)
    check_updates(stats, x.reshape(-1, C))
    assert_close(y.reshape(-1, C), xhat(x.reshape(-1, C)), TOL)


@pytest.mark.parametrize("momentum", [0.99, None])
def test_scan_over_steps_shares_and_carries_the_statistics(momentum):
    """Checks that scan over steps carries the statistics, and the count of steps if there is one."""
    scanned = nn.scan(
        lambda layer, carry, x: (carry, layer(x)),
        variable_broadcast="params",
        variable_carry="batch_stats",
        split_rngs={"params": False},
    )

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = norm(momentum=momentum)
            if self.is_initializing():  # variables that nn.scan carries must exist before
                return layer(x[0])
            return scanned(layer, 0, x)[1]

    x = batch(5)
    stats = only(apply_once(Net(), x)[1])
    if momentum is None:
        np.testing.assert_array_equal(stats["steps"], np.full(C, 5))
        assert_close(stats["mean"], np.asarray(x, np.float64).mean((0, 1)), TOL)
    else:
        check_updates(stats, *x)


def test_scan_over_layers():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return norm()(x) * 2 + 1, None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"params": 0, "batch_stats": 0}
            return nn.scan(Layer, variable_axes=axes, split_rngs={"params": True}, length=3)()(x, None)[0]

    x = batch()
    _, stats = apply_once(Net(), x)
    stats = only(stats)
    check_updates({k: v[0] for k, v in stats.items()}, x)
    for i in (1, 2):
        x = xhat(x) * 2 + 1
        check_updates({k: v[i] for k, v in stats.items()}, x)


@pytest.mark.parametrize("collection", ["params", "batch_stats"])
def test_map_variables(collection):
    """Checks variables stored doubled: the layer inside sees the original values, and its statistics step once."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            mapped = nn.map_variables(
                bnjax.linen.BatchNorm,
                collection,
                trans_in_fn=lambda v: jax.tree.map(lambda a: a / 2, v),
                trans_out_fn=lambda v: jax.tree.map(lambda a: a * 2, v),
                init=self.is_initializing(),
                mutable=collection == "batch_stats" or self.is_initializing(),
            )
            return mapped(use_running_average=False)(x)

    x = batch()
    variables = Net().init(jax.random.key(0), x)
    y, updates = Net().apply(variables, x, mutable=BATCH_STATS)
    factor = 2 if collection == "batch_stats" else 1
    check_updates({k: v / factor for k, v in only(updates["batch_stats"]).items()}, x)
    assert_close(y, xhat(x), TOL)
    (params,) = variables["params"].values()
    np.testing.assert_array_equal(params["scale"], np.full(C, 2 / factor))


def test_eval_shape_and_tabulate():
    module, x = norm(), batch()
    variables = module.init(jax.random.key(0), x)
    y, updates = jax.eval_shape(lambda v, x: module.apply(v, x, mutable=BATCH_STATS), variables, x)
    assert y.shape == x.shape
    assert updates["batch_stats"]["mean"].shape == (C,)
    table = module.tabulate(jax.random.key(0), x, console_kwargs=dict(width=200))
    assert "BatchNorm" in table
    assert "batch_stats" in table


def test_an_ensemble_by_vmap_over_variables():
    xs, keys = batch(3), jax.random.split(jax.random.key(0), 3)
    module = norm(scale_init=nn.initializers.normal())
    variables = jax.vmap(module.init)(keys, xs)
    ys, updates = jax.vmap(lambda v, x: module.apply(v, x, mutable=BATCH_STATS))(variables, xs)
    for i, x in enumerate(xs):
        check_updates({k: v[i] for k, v in updates["batch_stats"].items()}, x)
        member = jax.tree.map(lambda a, i=i: a[i], variables)
        assert_close(ys[i], module.apply(member, x, mutable=BATCH_STATS)[0], TOL)


def test_an_ensemble_on_one_batch():
    variables = jax.vmap(lambda key: norm(scale_init=nn.initializers.normal()).init(key, batch()))(
        jax.random.split(jax.random.key(0), 3)
    )
    apply = jax.vmap(lambda v, x: norm().apply(v, x, mutable=BATCH_STATS), in_axes=(0, None))
    _, updates = apply(variables, batch())
    for i in range(3):
        check_updates({k: v[i] for k, v in updates["batch_stats"].items()}, batch())


def test_without_a_mutable_collection():
    """Checks Flax's rule: updates need a mutable batch_stats, and update_stats=False does not."""
    x = batch()
    variables = norm().init(jax.random.key(0), x)
    with pytest.raises(Exception, match="batch_stats"):
        norm().apply(variables, x)
    y = norm().apply(variables, x, update_stats=False)
    np.testing.assert_array_equal(y, norm().apply(variables, x, mutable=BATCH_STATS)[0])


def test_a_layer_with_steps_evaluates_without_a_mutable_collection():
    module, x = norm(momentum=None), batch()
    variables = module.init(jax.random.key(0), x)
    module.apply(variables, x, update_stats=False)
    stats = {k: v for k, v in variables["batch_stats"].items() if k != "steps"}
    norm(momentum=None, use_running_average=True).apply({**variables, "batch_stats": stats}, x)
