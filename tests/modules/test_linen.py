"""Tests that linen.BatchNorm can replace Flax's: its fields, variables and numbers, with checkpoints both ways."""

import dataclasses

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import bnjax
from tests.support import oracle
from tests.support.cases import CASES, assert_close, expected, tolerance, unit

# Cases that Flax gets right: weights 0 and 1 only (it casts a mask to bool), no NaN in padding, not all rows masked.
ORDINARY = [c for c in CASES if c.mask in (None, "per_row", "per_position", "uneven", "empty_shard")]
KEY = jax.random.key(0)


def test_fields_are_flax_fields_in_order():
    ours = [(f.name, f.default) for f in dataclasses.fields(bnjax.BatchNorm)]
    theirs = [(f.name, f.default) for f in dataclasses.fields(nn.BatchNorm) if f.name not in ("parent", "name")]
    assert ours[: len(theirs)] == theirs
    assert bnjax.BatchNorm is bnjax.linen.BatchNorm
    assert bnjax.BatchNorm.__name__ == "BatchNorm"


def _variables(case, seed=3):
    rng = np.random.default_rng(seed)
    draw = lambda low, high: jnp.asarray(rng.uniform(low, high, case.feature_shape), jnp.float32)  # noqa: E731
    return dict(params=dict(scale=draw(0.5, 2), bias=draw(-1, 1)), batch_stats=dict(mean=draw(-1, 1), var=draw(0.5, 2)))


def _train(module, variables, case, **call):
    x, _, _, dy, mask = case.arrays()

    def loss(params, x):
        y, updates = module.apply(
            dict(variables, params=params), x, mask=mask, use_running_average=False, mutable=["batch_stats"], **call
        )
        return jnp.sum(y.astype(jnp.float32) * dy), (y, updates["batch_stats"])

    (grads, dx), (y, stats) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(variables["params"], jnp.asarray(x))
    return dict(y=y, stats=stats, grads=grads, dx=dx)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("case", ORDINARY, ids=str)
def test_same_numbers_as_flax(case, fast):
    variables = _variables(case)
    options = dict(axis=case.axis, momentum=0.9, use_fast_variance=fast)
    ours, theirs = (_train(m(**options), variables, case) for m in (bnjax.BatchNorm, nn.BatchNorm))
    # Flax's own error: its variance is that of E[x²] − E[x]², or of x less a mean that was rounded first.
    flax = tolerance(case) * (2 + case.offset**2) * 4
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert ours["y"].dtype == theirs["y"].dtype
    terms = case.rows * (1 + case.offset)
    assert_close(ours["y"], theirs["y"], flax, what="y")
    rounding = unit(case.dtype) * 4 if case.dtype != "float32" else 0
    if case.rows > 1:  # the derivative for a single row is 0, and rounding errors times 1/√ε = 316
        assert_close(ours["dx"], theirs["dx"], flax + rounding, what="dx")
    if case.rows == 1:  # one row says nothing about the variance: here the running one stays, in Flax it shrinks
        theirs["stats"]["var"] = variables["batch_stats"]["var"]
    for name in ("mean", "var"):
        assert_close(ours["stats"][name], theirs["stats"][name], flax, what=name)
    for name in ("scale", "bias"):
        assert_close(ours["grads"][name], theirs["grads"][name], flax, terms, name)


@pytest.mark.parametrize("case", ORDINARY, ids=str)
def test_evaluation_is_the_same_as_flax(case):
    x, *_ = case.arrays()
    variables = _variables(case)
    ours, theirs = (
        m(use_running_average=True, axis=case.axis).apply(variables, x) for m in (bnjax.BatchNorm, nn.BatchNorm)
    )
    assert ours.dtype == theirs.dtype
    assert_close(ours, theirs, 20 * unit("float32"), what="y")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_running_statistics_follow_the_oracle(case):
    variables = _variables(case)
    out = _train(bnjax.BatchNorm(axis=case.axis, momentum=0.9), variables, case)
    want = expected(case, case.arrays())
    old = [np.asarray(variables["batch_stats"][k]) for k in ("mean", "var")]
    mean, var = oracle.update_running(old, want.statistics, 0.9)
    assert_close(out["stats"]["mean"], mean, tolerance(case), 1 + abs(case.offset), "mean")
    assert_close(out["stats"]["var"], var, 16 * tolerance(case), what="var")


OPTIONS = [
    dict(),
    dict(use_scale=False),
    dict(use_bias=False),
    dict(use_scale=False, use_bias=False),
    dict(dtype=jnp.bfloat16),
    dict(param_dtype=jnp.bfloat16),
    dict(param_dtype=jnp.float16, force_float32_reductions=False),
    dict(axis=(1, -1)),
    dict(scale_init=nn.initializers.normal(), bias_init=nn.initializers.normal()),
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options) or "defaults")
@pytest.mark.parametrize("shape", [(4, 3, 5), (1, 3, 5)])
def test_init_makes_the_same_variables_as_flax(options, shape):
    x = jnp.linspace(-1, 1, int(np.prod(shape))).reshape(shape)
    ours, theirs = (m(**options).init(KEY, x, use_running_average=False) for m in (bnjax.BatchNorm, nn.BatchNorm))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), ours) == jax.tree.map(lambda a: (a.shape, a.dtype), theirs)
    jax.tree.map(lambda a, b: assert_close(a, b, 0), ours, theirs)


def test_init_needs_no_axis_and_one_row_will_do():
    norm = bnjax.BatchNorm(use_running_average=False, axis_name="data", axis_index_groups=[[0, 1], [2, 3]])
    variables = norm.init(KEY, jnp.full((1, 3), 7.0))
    assert_close(variables["batch_stats"]["mean"], np.zeros(3), 0)
    assert_close(variables["batch_stats"]["var"], np.ones(3), 0)


class Net(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x, train):
        for width in (4, 8):
            x = nn.Conv(width, (3, 3), use_bias=False)(x)
            x = nn.relu(self.norm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(3)(x.mean((1, 2)))


def _trained(norm):
    net, x = Net(norm), jax.random.normal(KEY, (8, 6, 6, 2))
    variables = net.init(KEY, x, train=True)
    _, updates = net.apply(variables, x, train=True, mutable=["batch_stats"])
    return net, x, {**variables, **updates}


@pytest.mark.slow
@pytest.mark.parametrize(("writer", "reader"), [(nn.BatchNorm, bnjax.BatchNorm), (bnjax.BatchNorm, nn.BatchNorm)])
def test_checkpoints_go_both_ways(tmp_path, writer, reader):
    """Checks Orbax on disk and Flax's msgpack: same tree, same evaluation, and training continues."""
    net, x, variables = _trained(writer)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", variables)
        checkpointer.wait_until_finished()
        other, _, template = _trained(reader)
        restored = checkpointer.restore(tmp_path / "checkpoint", template)
    packed = flax.serialization.from_bytes(template, flax.serialization.to_bytes(variables))
    for loaded in (restored, packed):
        jax.tree.map(lambda a, b: assert_close(a, b, 0), loaded, variables)
        assert_close(other.apply(loaded, x, train=False), net.apply(variables, x, train=False), 100 * unit("float32"))
        other.apply(loaded, x, train=True, mutable=["batch_stats"])


def test_three_controls_are_independent():
    x = jax.random.normal(KEY, (16, 3)) + 2
    norm = bnjax.BatchNorm(momentum=0.9)
    variables = norm.init(KEY, x, use_running_average=False)
    y, updates = norm.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    assert np.all(updates["batch_stats"]["mean"] > 0.1)
    same = norm.apply(variables, x, use_running_average=False, update_stats=False)  # no mutable collection is needed
    assert_close(same, y, 0)
    _, kept = norm.apply(variables, x, use_running_average=False, update_stats=False, mutable=["batch_stats"])
    jax.tree.map(lambda a, b: assert_close(a, b, 0), kept["batch_stats"], variables["batch_stats"])
    _, kept = norm.apply(variables, x, use_running_average=True, update_stats=True, mutable=["batch_stats"])
    jax.tree.map(lambda a, b: assert_close(a, b, 0), kept["batch_stats"], variables["batch_stats"])


def test_use_running_average_is_given_exactly_once():
    x = jnp.ones((4, 3))
    with pytest.raises(ValueError, match="use_running_average"):
        bnjax.BatchNorm().init(KEY, x)
    with pytest.raises(ValueError, match="use_running_average"):
        bnjax.BatchNorm(use_running_average=True).init(KEY, x, use_running_average=True)


def test_wrong_channel_count_is_refused():
    """Checks for an error where Flax, without scale and bias, silently broadcasts one channel to three."""
    norm = bnjax.BatchNorm(use_scale=False, use_bias=False)
    variables = norm.init(KEY, jnp.ones((4, 1)), use_running_average=False)
    for use_running_average in (True, False):
        with pytest.raises(ValueError, match="shape"):
            norm.apply(variables, jnp.ones((4, 3)), use_running_average, mutable=["batch_stats"])


def test_flax_loses_what_bnjax_keeps():
    """Checks DESIGN's list of defects: Flax has them and bnjax has not. If Flax fixes one, change the README."""
    x = np.asarray(np.random.default_rng(0).normal(size=(4096, 2)) + 1e4, np.float32)
    want = oracle.statistics(x, (1,))

    def run(module):
        m = module(use_running_average=False, momentum=0.0)
        return m.apply(m.init(KEY, x), x, mutable=["batch_stats"])

    y, updates = run(bnjax.BatchNorm)
    assert_close(updates["batch_stats"]["var"], want.var, 1e-5)
    y, updates = run(nn.BatchNorm)
    assert np.max(np.abs(updates["batch_stats"]["var"] / want.var - 1)) > 0.5
