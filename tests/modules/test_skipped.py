"""Tests batches with NaN or Inf: the channel keeps its running averages, counts the batch, and continues."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bnjax
from bnjax import tools

CHANNELS = 3
GOOD = jnp.asarray(np.random.default_rng(0).normal(2.0, 3.0, (16, CHANNELS)), jnp.float32)
BAD = {"NaN": jnp.nan, "Inf": jnp.inf, "-Inf": -jnp.inf}
FIELDS = {"BatchNorm": {}, "GhostBatchNorm": dict(virtual_batch_size=8), "BatchRenorm": {}, "PowerNorm": {}}


def _linen(name):
    """Returns a step (variables, x) -> variables, the initial variables, and a function that extracts the
    statistics.
    """
    module = getattr(bnjax.linen, name)(use_running_average=False, momentum=0.9, count_skipped=True, **FIELDS[name])

    @jax.jit
    def step(variables, x):
        _, updates = module.apply(variables, x, mutable=["batch_stats"])
        return variables | updates

    return step, module.init(jax.random.key(0), GOOD), lambda variables: variables["batch_stats"]


def _nnx(name):
    """Returns a step (state, x) -> state, the initial state, and a function that extracts the statistics."""
    rngs = nnx.Rngs(0)
    module = getattr(bnjax.nnx, name)(CHANNELS, momentum=0.9, count_skipped=True, rngs=rngs, **FIELDS[name])
    graph, start = nnx.split(module)

    @jax.jit
    def step(state, x):
        module = nnx.merge(graph, state)
        module(x)
        return nnx.state(module)

    return step, start, lambda state: {name: v[...] for name, v in state.items() if isinstance(v, nnx.BatchStat)}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("api", [_linen, _nnx], ids=["linen", "nnx"])
def test_a_bad_batch_is_counted_and_leaves_no_other_trace(api, name, bad):
    step, start, stats = api(name)
    clean = step(step(start, GOOD), GOOD[::-1] + 1)
    between = step(step(start, GOOD), GOOD.at[3, 1].set(bad))
    after = stats(step(between, GOOD[::-1] + 1))
    np.testing.assert_array_equal(after["skipped"], [0, 1, 0])
    np.testing.assert_array_equal(stats(clean)["skipped"], [0, 0, 0])
    for role in ("mean", "var"):
        assert np.isfinite(after[role]).all()
        np.testing.assert_array_equal(after[role][1], stats(clean)[role][1])


def test_each_domain_counts_its_own():
    norm = bnjax.linen.SplitBatchNorm(num_domains=2, use_running_average=False, count_skipped=True)
    variables = norm.init(jax.random.key(0), GOOD, domain=0)
    _, updates = norm.apply(variables, GOOD.at[0, 2].set(jnp.nan), domain=1, mutable=["batch_stats"])
    np.testing.assert_array_equal(updates["batch_stats"]["skipped"], [[0, 0, 0], [0, 0, 1]])


def test_an_empty_batch_is_no_bad_one():
    running = bnjax.RunningStats(jnp.zeros(2), jnp.ones(2), skipped=jnp.zeros(2))
    moments = bnjax.Moments(jnp.array([jnp.nan, jnp.nan]), jnp.ones(2), jnp.array([0.0, 8.0]))
    np.testing.assert_array_equal(bnjax.update_running(running, moments).skipped, [0, 1])


def test_the_counter_is_optional_on_loading():
    plain = bnjax.linen.BatchNorm(use_running_average=False).init(jax.random.key(0), GOOD)
    counting = bnjax.linen.BatchNorm(use_running_average=False, count_skipped=True)
    _, updates = counting.apply(plain, GOOD.at[0, 0].set(jnp.nan), mutable=["batch_stats"])
    np.testing.assert_array_equal(updates["batch_stats"]["skipped"], [1, 0, 0])
    module = bnjax.nnx.BatchNorm(CHANNELS, count_skipped=True, rngs=nnx.Rngs(0))
    nnx.update(module, nnx.state(bnjax.nnx.BatchNorm(CHANNELS, rngs=nnx.Rngs(0))))
    module(GOOD.at[0, 0].set(jnp.nan))
    np.testing.assert_array_equal(module.skipped[...], [1, 0, 0])


def test_inspect_shows_the_count_and_reset_starts_it_again():
    step, variables, stats = _linen("BatchNorm")
    for batch in (GOOD, GOOD.at[0, 1].set(jnp.nan), GOOD.at[:, 1].set(jnp.inf), GOOD):
        variables = step(variables, batch)
    table = tools.inspect(variables)
    assert table.rows[0]["skipped"] == 2
    assert "2 batches held NaN or Inf" in table.rows[0]["flags"][0] and "skipped" in str(table)
    again = tools.reset_stats(variables, statistics=["skipped"])
    assert tools.inspect(again).rows[0]["skipped"] == 0
    np.testing.assert_array_equal(stats(again)["mean"], stats(variables)["mean"])
    with pytest.raises(ValueError, match="statistics must be some of"):
        tools.reset_stats(variables, statistics=["counts"])


def test_merged_replicas_add_their_counts():
    parts = [{"bn": {"mean": jnp.zeros(1), "var": jnp.ones(1), "skipped": jnp.array([n])}} for n in (1.0, 2.0)]
    merged = tools.merge_stats(parts)
    np.testing.assert_array_equal(merged["bn"]["skipped"], [3.0])


def test_a_skipped_optimizer_step_can_skip_the_statistics_too():
    """Checks that statistics can follow `optax.apply_if_finite`, which skips parameters and optimizer state."""
    norm, optimizer = bnjax.linen.BatchNorm(use_running_average=False), optax.apply_if_finite(optax.sgd(0.1), 5)
    variables = norm.init(jax.random.key(0), GOOD)
    state = (variables["params"], variables["batch_stats"], optimizer.init(variables["params"]))

    @jax.jit
    def step(state, x):
        params, stats, opt = state

        def loss(params):
            y, updates = norm.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
            return jnp.mean((y - 1) ** 2), updates["batch_stats"]

        grads, new_stats = jax.grad(loss, has_aux=True)(params)
        updates, opt = optimizer.update(grads, opt, params)
        stats = jax.tree.map(lambda new, old: jnp.where(opt.last_finite, new, old), new_stats, stats)
        return optax.apply_updates(params, updates), stats, opt

    clean = step(step(state, GOOD), GOOD * 2)
    dirty = step(step(step(state, GOOD), GOOD.at[0, 1].set(jnp.nan)), GOOD * 2)
    chex.assert_trees_all_equal(dirty[:2], clean[:2])
    assert dirty[2].total_notfinite == 1
