"""Tests running averages (constant, scheduled or no momentum; debiased; unbiased variance) against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bnjax
from tests.support.cases import assert_close, unit
from tests.support.layers import LAYERS, Linen, Nnx

STEPS, ROWS, C = 7, 16, 3
TOL = 60 * unit(
    "float32"
)  # some five operations per step on numbers of similar size, and as many for the batch moments


@pytest.fixture(params=LAYERS)
def layer(request):
    return lambda **fields: LAYERS[request.param]((ROWS, C), **fields)


def batches(seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(ROWS, C)) * (i + 1) + i).astype(np.float32) for i in range(STEPS)]


def moments(xs):
    xs = [x.astype(np.float64) for x in xs]
    return np.array([x.mean(0) for x in xs]), np.array([x.var(0) for x in xs])


def exponential(values, start, old_weights):
    for new, m in zip(values, old_weights, strict=True):
        start = m * start + (1 - m) * new
    return start


def check(layer, mean, var):
    assert_close(layer.stats["mean"], mean, TOL, what="mean")
    assert_close(layer.stats["var"], var, TOL, what="var")


@pytest.mark.parametrize("momentum", [0, 0.0, 0.9, 1, 1.0])
def test_a_number(layer, momentum):
    norm, xs = layer(momentum=momentum), batches()
    for x in xs:
        norm(x)
    means, variances = moments(xs)
    weights = [momentum] * STEPS
    check(norm, exponential(means, 0, weights), exponential(variances, 1, weights))
    assert set(norm.stats) == {"mean", "var"}


def test_a_schedule_of_the_step(layer):
    schedule = optax.linear_schedule(0.0, 0.99, 5)
    norm, xs = layer(momentum=schedule), batches()
    for x in xs:
        norm(x)
    means, variances = moments(xs)
    weights = [float(schedule(t)) for t in range(STEPS)]
    check(norm, exponential(means, 0, weights), exponential(variances, 1, weights))
    np.testing.assert_array_equal(norm.stats["steps"], np.full(C, STEPS))


@pytest.mark.parametrize(
    "schedule",
    [lambda t: 0.5, lambda t: jax.lax.cond(t < 3, lambda: 0.5, lambda: 0.5), optax.constant_schedule(0.5)],
    ids=["constant", "branching", "optax"],
)
def test_a_schedule_may_ignore_the_step_or_branch_on_it(layer, schedule):
    by_schedule, by_number = layer(momentum=schedule), layer(momentum=0.5)
    for x in batches():
        by_schedule(x), by_number(x)
    check(by_schedule, by_number.stats["mean"], by_number.stats["var"])


def test_none_is_the_plain_average(layer):
    norm, xs = layer(momentum=None), batches()
    for i, x in enumerate(xs):
        norm(x)
        means, variances = moments(xs[: i + 1])
        check(norm, means.mean(0), variances.mean(0))


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99, 0.99999, 1.0])
def test_debiased_is_the_weighted_average_of_the_batches_alone(layer, momentum):
    """Checks normalised weights mᵗ: the starting mean 0 and variance 1 have no influence."""
    norm, xs = layer(momentum=momentum, debias=True), batches()
    for i, x in enumerate(xs):
        norm(x)
        weights = float(momentum) ** np.arange(i, -1, -1)
        check(norm, *(np.average(v, 0, weights) for v in moments(xs[: i + 1])))


def test_debiased_takes_the_first_batch_exactly(layer):
    norm, x = layer(momentum=0.999, debias=True), batches()[0]
    norm(x)
    want = bnjax.batch_moments(x)
    check(norm, want.mean, want.var)
    again = layer(momentum=0.0)
    again(x)
    for name in ("mean", "var"):
        np.testing.assert_array_equal(norm.stats[name], again.stats[name])


def test_debiased_constant_batches_give_that_constant(layer):
    """Checks constant batches: equinox debiases a variance that starts at 1 as if at 0, and reports v + mᵗ/(1 − mᵗ)."""
    norm, x = layer(momentum=0.9, debias=True), batches()[2]
    for _ in range(5):
        norm(x)
        check(norm, x.mean(0, dtype=np.float64), x.var(0, dtype=np.float64))


@pytest.mark.parametrize("rows", [2, 3, 16])
def test_unbiased_variance_as_pytorch(rows):
    for api in LAYERS.values():
        norm, x = api((rows, C), momentum=0.9, unbiased_var=True), batches()[1][:rows]
        y = norm(x)
        check(norm, 0.1 * x.mean(0, dtype=np.float64), 0.9 + 0.1 * x.var(0, ddof=1, dtype=np.float64))
        plain = api((rows, C))
        np.testing.assert_array_equal(y, plain(x))  # it normalises by the biased one, as PyTorch does


def test_unbiased_variance_counts_the_rows_of_all_devices():
    x = batches()[1]
    split = jnp.asarray(x).reshape(4, 4, C)
    m = jax.vmap(lambda x: bnjax.batch_moments(x, axis_name="data"), axis_name="data")(split)
    start = bnjax.RunningStats(jnp.zeros((4, C)), jnp.ones((4, C)))
    got = bnjax.update_running(start, m, momentum=0.0, unbiased_var=True)
    assert_close(got.var[0], x.var(0, ddof=1, dtype=np.float64), TOL)


def test_one_row_has_no_unbiased_variance(layer):
    for weights in ([[1.0]] + [[0.0]] * 15, [[0.25]] + [[0.0]] * 15):
        norm = layer(momentum=0.0, unbiased_var=True)
        norm(batches()[0], mask=jnp.array(weights))
        np.testing.assert_array_equal(norm.stats["var"], np.ones(C))  # as it started


@pytest.mark.parametrize("fields", [dict(momentum=None), dict(momentum=0.9, debias=True)], ids=["none", "debiased"])
def test_a_bad_batch_counts_in_no_channel_that_it_spoils(layer, fields):
    """Checks that steps are counted per channel: a channel that skips a batch averages the others."""
    norm, xs = layer(**fields), batches()
    for i, x in enumerate(xs):
        x = x.copy()
        if i == 0:
            x[3, 1] = np.nan
        norm(x)
    np.testing.assert_array_equal(norm.stats["steps"], [STEPS, STEPS - 1, STEPS])
    clean = layer(**fields)
    for x in xs[1:]:
        clean(x)
    for name in ("mean", "var"):
        assert_close(norm.stats[name][1], clean.stats[name][1], TOL)


def test_the_step_is_optional_on_loading(layer):
    """Checks that a checkpoint without steps evaluates unchanged, and that training then counts from 0."""
    trained = layer(momentum=0.9)
    for x in batches():
        trained(x)
    norm, x = layer(momentum=None), batches(1)[0]
    norm.load(trained.stats)
    np.testing.assert_array_equal(norm(x, use_running_average=True), trained(x, use_running_average=True))
    norm(x)
    check(norm, x.mean(0, dtype=np.float64), x.var(0, dtype=np.float64))


def test_a_checkpoint_with_the_step_loads_where_none_is_kept():
    norm, x = Linen((ROWS, C), momentum=None), batches()[0]
    norm(x)
    plain = Linen((ROWS, C))
    plain.load(norm.stats)
    plain(x)
    norm_nnx, plain_nnx = Nnx((ROWS, C), momentum=None), Nnx((ROWS, C))
    norm_nnx(x)
    nnx.update(plain_nnx.module, {k: nnx.BatchStat(jnp.asarray(norm_nnx.stats[k])) for k in ("mean", "var")})
    np.testing.assert_array_equal(plain_nnx.stats["mean"], norm_nnx.stats["mean"])


def test_evaluation_counts_nothing_and_needs_no_step(layer):
    norm, x = layer(momentum=None), batches()[0]
    norm(x)
    before = norm.stats
    norm(x, use_running_average=True)
    norm(x, update_stats=False)
    for name, value in norm.stats.items():
        np.testing.assert_array_equal(value, before[name])


def test_averages_run_in_a_scan():
    xs = jnp.array(batches())
    start = bnjax.RunningStats(jnp.zeros(C), jnp.ones(C), jnp.zeros(C))

    def step(running, x):
        return bnjax.update_running(running, bnjax.batch_moments(x), momentum=None), None

    got, _ = jax.lax.scan(step, start, xs)
    means, variances = moments(batches())
    assert_close(got.mean, means.mean(0), TOL)
    assert_close(got.var, variances.mean(0), TOL)


@pytest.mark.parametrize("momentum", [None, lambda t: 0.5], ids=["none", "schedule"])
def test_a_missing_step_is_said(momentum):
    running = bnjax.RunningStats(jnp.zeros(C), jnp.ones(C))
    with pytest.raises(ValueError, match=r"running\.steps is None"):
        bnjax.update_running(running, bnjax.batch_moments(batches()[0]), momentum=momentum)


def test_debias_of_a_schedule_is_refused(layer):
    with pytest.raises(ValueError, match="constant momentum"):
        layer(momentum=lambda t: 0.5, debias=True)(batches()[0])


@pytest.mark.parametrize("momentum", [1.5, -0.1, float("nan")])
@pytest.mark.parametrize("debias", [False, True])
def test_momentum_outside_its_range_is_refused(layer, momentum, debias):
    with pytest.raises(ValueError, match="weight of the OLD"):
        layer(momentum=momentum, debias=debias)(batches()[0])


def test_an_empty_part_takes_no_part_in_what_is_pooled():
    parts = bnjax.Moments(*(jnp.array([[a], [b]]) for a, b in ((1.0, jnp.nan), (2.0, jnp.nan), (4.0, 0.0))))
    pooled = jax.vmap(lambda m: bnjax.pool_moments(m, axis_name="part"), axis_name="part")(parts)
    for got, want in zip(pooled, (1, 2, 4), strict=True):
        np.testing.assert_array_equal(got, [[want], [want]])


@pytest.mark.slow
def test_averages_of_everybody_count_everybody_s_rows():
    """Checks that with stats_axis_name the unbiased variance is that of the rows of all devices."""
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    norm = bnjax.BatchNorm(use_running_average=False, momentum=0.0, stats_axis_name="i", unbiased_var=True)
    variables = norm.init(jax.random.key(0), x[0])
    train = lambda x: norm.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]["var"]  # noqa: E731
    wanted = x.reshape(-1, 4).var(0, ddof=1)
    assert_close(jax.vmap(train, axis_name="i")(jnp.asarray(x)), np.stack([wanted, wanted]), 16 * unit("float32"))
