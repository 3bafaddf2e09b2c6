"""Tests accuracy where float32 is hard: far from zero; huge, tiny and constant channels; large counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
from tests.support import oracle
from tests.support.cases import Case, assert_close, tolerance, unit

SHAPE = (64, 14, 14, 8)
RATIOS = [0.0, 1.0, 3.0, 10.0, 1e2, 1e3, 1e4, 1e5]


def _reference(x, dy):
    return oracle.batch_norm(np.asarray(x, np.float64), np.ones(x.shape[-1]), np.zeros(x.shape[-1]), dy, (x.ndim - 1,))


@pytest.mark.parametrize("jitted", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_far_from_zero(dtype, ratio, jitted):
    rng = np.random.default_rng(int(ratio))
    x = jnp.asarray(rng.normal(size=SHAPE) + min(ratio, 3e4 if dtype == "float16" else ratio), dtype)
    dy = rng.normal(size=SHAPE).astype(np.float32)
    want = _reference(x, dy)

    def step(x):
        def loss(x):
            y, moments = bnjax.batch_norm(x, dtype=jnp.float32)
            return jnp.sum(y * dy), (y, moments)

        return jax.grad(loss, has_aux=True)(x)

    dx, (y, moments) = (jax.jit(step) if jitted else step)(x)
    tol = tolerance(Case("", SHAPE))
    assert_close(moments.mean, want.statistics.mean, unit("float32") * 4, ratio + 1, "mean")
    # Without the guard e² ≤ 16·var, so the error of the variance is at most 17 times that of a sum.
    assert_close(moments.var, want.statistics.var, 17 * tol, want.statistics.var + 1e-8, "var")
    assert_close(y, want.y, 17 * tol, what="y")
    assert_close(dx, want.dx, 17 * tol + unit(dtype) * (dtype != "float32"), what="dx")


@pytest.mark.parametrize("std", [1e-6, 1e-3, 1.0, 1e3, 1e8])
@pytest.mark.parametrize("ratio", [1e3, 1e4])
def test_at_any_scale(std, ratio):
    rng = np.random.default_rng(0)
    x = ((rng.normal(size=SHAPE) + ratio) * std).astype(np.float32)
    want = _reference(x, np.ones(SHAPE))
    y, moments = bnjax.batch_norm(x)
    assert_close(moments.var, want.statistics.var, 1e-5, what="var")
    assert_close(y, want.y, 1e-5, what="y")
    assert_close(bnjax.batch_moments(x).var, want.statistics.var, 1e-5, what="var")


CONSTANTS = [0.0, 1e-3, 0.1, 1.0, 3.3, -777.7, 99840.0, 1e5, 1e6, -7.77e6, 3e7, 1e9, -7.777e9, 1e10, 1e11, 1e18, 1e30]


@pytest.mark.parametrize("channels", [1, 3])  # XLA simplifies the program of a single channel further
@pytest.mark.parametrize("value", CONSTANTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_constant_channel_gives_the_bias(dtype, value, channels):
    x = jnp.full((32, 13, 13, channels), value, dtype)
    bias = jnp.array([-1.0, 0.0, 0.5])[:channels]

    def f(x):
        return bnjax.batch_norm(x, jnp.array([1.0, 2.0, 0.5])[:channels], bias, dtype=jnp.float32)[0]

    for y in (f(x), jax.jit(f)(x)):
        assert_close(y, np.broadcast_to(bias, x.shape), 1e-3, 1.0, "y")
    dx = jax.grad(lambda x: jnp.sum(f(x) * jnp.sin(jnp.arange(x.size).reshape(x.shape))))(x)
    assert np.isfinite(dx).all()


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize(
    ("scale", "offset"),
    [(s, m) for s in (1e18, 1e20, 1e25, 1e30) for m in (0.0, 2.0, 30.0)] + [(1e36, 0.0), (1e36, 2.0)],
)
def test_squares_that_overflow(scale, offset, channels):
    """Checks that y is standardised and the gradient finite; the variance overflows, so the running averages stay
    unchanged.
    """
    rng = np.random.default_rng(0)
    x = ((rng.normal(size=(64, channels)) + offset) * scale).astype(np.float32)
    want = _reference(x, np.ones(x.shape))
    y, moments = bnjax.batch_norm(x)
    assert_close(y, want.y, 1e-5, what="y")
    assert_close(moments.mean, want.statistics.mean, 1e-5, scale * (1 + offset), "mean")
    assert np.isfinite(jax.grad(lambda x: jnp.sum(bnjax.batch_norm(x)[0] * x[::-1] / scale))(x)).all()
    running = bnjax.update_running(bnjax.RunningStats(jnp.zeros(channels), jnp.ones(channels)), moments)
    assert np.isfinite(running.mean).all()
    assert np.isfinite(running.var).all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("weights", [None, np.arange(64) % 3 < 2, np.linspace(0.5, 2, 64, dtype=np.float32)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e10, 1e16, 1e19, 1e25])
def test_far_from_zero_at_every_size(scale, weights, channels):
    """Checks y at a mean of 1,000 standard deviations: K must be the same number where it is subtracted and added."""
    x = ((np.random.default_rng(0).normal(size=(64, channels)) + 1000) * scale).astype(np.float32)
    mask = None if weights is None else weights[:, None]
    ones, zeros = np.ones(channels), np.zeros(channels)
    want = oracle.batch_norm(x.astype(np.float64), ones, zeros, np.ones(x.shape), (1,), mask=mask)
    y, moments = bnjax.batch_norm(x, mask=mask)
    assert_close(y, want.y, 1e-5, what="y")
    assert_close(moments.mean, want.statistics.mean, unit("float32"), 1000 * scale, "mean")


def test_an_overflowing_channel_leaves_the_others_exact():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 3)).astype(np.float32) * np.array([1.0, 1e30, 1e-3], np.float32)
    want = _reference(x, np.ones(x.shape))
    assert_close(bnjax.batch_norm(x)[0], want.y, 1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_value_stays_in_its_channel(bad):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 3)).astype(np.float32)
    x[7, 1] = bad
    y, moments = bnjax.batch_norm(x)
    good = np.array([0, 2])
    want = _reference(x[:, good], np.ones((64, 2)))
    assert np.isnan(y[:, 1]).any()
    assert_close(y[:, good], want.y, 1e-5)
    running = bnjax.RunningStats(jnp.full(3, 0.5), jnp.full(3, 2.0))
    after = bnjax.update_running(running, moments, momentum=0.9)
    assert after.mean[1] == 0.5
    assert after.var[1] == 2.0
    after = bnjax.update_running(after, bnjax.batch_moments(np.nan_to_num(x, posinf=0, neginf=0)), momentum=0.9)
    assert np.isfinite(after.mean).all()
    assert after.var[1] != 2.0


def test_float16_sums_over_65504():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4096, 2)) + 300, jnp.float16)
    want = _reference(x, np.ones(x.shape))
    y, moments = bnjax.batch_norm(x)
    assert y.dtype == jnp.float16
    assert_close(y, want.y, 2 * unit("float16"), what="y")
    assert_close(moments.var, want.statistics.var, 1e-5, what="var")


def test_counts_over_two_to_the_24():
    rows = 2**24 + 4096  # adding ones in float32 stops at 2²⁴
    x = jnp.asarray(np.random.default_rng(0).integers(0, 8, (rows, 1)), jnp.bfloat16)
    want = np.asarray(x, np.float64)
    for moments in (bnjax.batch_moments(x), bnjax.batch_moments(x, mask=jnp.ones((rows, 1), bool))):
        assert moments.count[0] == rows
        assert_close(moments.mean, want.mean(0), 1e-6)
        assert_close(moments.var, want.var(0), 1e-5)


def test_counts_over_two_to_the_31():
    x = np.array([[1.0], [2.0], [4.0]], np.float32)
    weights = np.array([[2**31 - 1], [2**30], [2**31 - 1]], np.int32)
    want = oracle.statistics(x, (1,), weights)
    moments = bnjax.batch_moments(x, mask=weights)
    for a, b, name in zip(moments, want, moments._fields, strict=True):
        assert_close(a, b, 1e-6, what=name)
    merged = bnjax.merge_moments(*[moments] * 5)
    assert_close(merged.count, 5 * want.count, 1e-6)
    assert_close(merged.var, want.var, 1e-6)


def test_weights_that_are_tiny_or_huge():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(32, 3)).astype(np.float32), rng.random((32, 1)).astype(np.float32)
    want = oracle.statistics(x, (1,), w)
    for factor in (1e-30, 1e-6, 1e6, 1e30):
        moments = bnjax.batch_moments(x, mask=w * np.float32(factor))
        assert_close(moments.mean, want.mean, 1e-5, 1.0, "mean")
        assert_close(moments.var, want.var, 1e-5, what="var")
