"""Tests values and gradients of the functional core against the float64 oracle, over the whole table of cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
from tests.support import oracle
from tests.support.cases import CASES, assert_close, expected, tolerance, unit


def _y_tolerance(case, dtype="float32"):
    return tolerance(case) + unit(dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_batch_norm_value(case):
    x, scale, bias, dy, mask = arrays = case.arrays()
    want = expected(case, arrays)
    y, moments = bnjax.batch_norm(x, scale, bias, axis=case.axis, mask=mask, dtype=jnp.float32)
    assert_close(y, want.y, _y_tolerance(case), what="y")
    assert_close(moments.mean, want.statistics.mean, tolerance(case), 1 + abs(case.offset), "mean")
    assert_close(moments.var, want.statistics.var, tolerance(case) * 16, what="var")
    assert_close(moments.count, want.statistics.count, tolerance(case), what="count")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_batch_norm_gradient(case):
    x, scale, bias, dy, mask = arrays = case.arrays()
    want = expected(case, arrays)

    def loss(x, scale, bias):
        y, _ = bnjax.batch_norm(x, scale, bias, axis=case.axis, mask=mask, dtype=jnp.float32)
        return jnp.sum(y * dy)

    dx, dscale, dbias = jax.jit(jax.grad(loss, (0, 1, 2)))(jnp.asarray(x), scale, bias)
    assert dx.dtype == x.dtype
    # Every sum has terms as large as |dy·xhat|, so its error is relative to Σ|terms|, not to the sum itself.
    terms = np.abs(dy).sum() / max(1, np.prod(case.feature_shape)) * (1 + np.max(np.abs(want.y)))
    rounding = unit(case.dtype) if case.dtype != "float32" else 0
    # For a single row dx is 0, the difference of terms of this size; elsewhere it is about as large as they are.
    size = np.max(np.abs(dy)) * np.max(scale) * np.max((want.statistics.var + 1e-5) ** -0.5)
    assert_close(dx, want.dx, 4 * tolerance(case) + rounding, size, what="dx")
    assert_close(dscale, want.dscale, tolerance(case), terms, "dscale")
    assert_close(dbias, want.dbias, tolerance(case), terms, "dbias")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_batch_moments_agree_with_batch_norm(case):
    x, scale, bias, _, mask = case.arrays()
    moments = bnjax.batch_moments(x, axis=case.axis, mask=mask)
    _, same = bnjax.batch_norm(x, scale, bias, axis=case.axis, mask=mask)
    for a, b, name in zip(moments, same, moments._fields, strict=True):
        assert_close(a, b, 32 * tolerance(case), what=name)
        assert a.dtype == jnp.float32


def test_nobody():
    """Checks a batch without any weight: statistics unchanged, output and gradients finite."""
    x = jnp.array([[1.0, jnp.nan], [jnp.inf, 2.0]])
    mask = jnp.zeros((2, 1))
    y, moments = bnjax.batch_norm(x, mask=mask)
    assert np.isfinite(y).all() and not np.any(moments.count)
    dx = jax.grad(lambda x: jnp.sum(bnjax.batch_norm(x, mask=mask)[0] ** 2))(x)
    assert np.isfinite(dx).all()
    running = bnjax.RunningStats(jnp.array([3.0, 4.0]), jnp.array([5.0, 6.0]))
    assert_close(bnjax.update_running(running, moments).mean, running.mean, 0)
    assert_close(bnjax.update_running(running, moments).var, running.var, 0)


@pytest.mark.parametrize("shape", [(0, 3), (0,), (4, 0), (2, 0, 3)])
def test_empty_arrays(shape):
    y, moments = bnjax.batch_norm(jnp.zeros(shape))
    assert y.shape == shape and moments.mean.shape == shape[-1:]
    assert np.isfinite(moments.mean).all() and np.isfinite(moments.var).all()
    assert jax.grad(lambda x: bnjax.batch_norm(x)[0].sum())(jnp.zeros(shape)).shape == shape


@pytest.mark.parametrize("case", CASES, ids=str)
def test_normalize(case):
    x, scale, bias, _, _ = case.arrays()
    rng = np.random.default_rng(1)
    mean, var = rng.normal(size=case.feature_shape), rng.uniform(0.1, 2, case.feature_shape)
    y = bnjax.normalize(
        x, mean.astype(np.float32), var.astype(np.float32), scale, bias, axis=case.axis, dtype=jnp.float32
    )
    mean, var = mean.astype(np.float32), var.astype(np.float32)
    want = oracle.normalize(x.astype(np.float64), mean, var, scale, bias, case.features)
    finite = np.isfinite(want)
    assert (np.isnan(y) == ~finite).all()
    assert_close(np.where(finite, y, 0), np.where(finite, want, 0), 20 * unit("float32"), what="y")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "bool"])
@pytest.mark.parametrize("params", ["float32", "bfloat16", None])
def test_output_dtype_is_flax_promotion(dtype, params):
    x = jnp.ones((4, 3)).astype(dtype)
    scale = None if params is None else jnp.ones(3, params)
    y, moments = bnjax.batch_norm(x, scale)
    wide = x if jnp.issubdtype(dtype, jnp.floating) else x.astype(jnp.float32)
    assert y.dtype == (wide.dtype if scale is None else jnp.result_type(wide, scale))
    assert moments.mean.dtype == jnp.float32
    assert bnjax.batch_norm(x, scale, dtype=jnp.float16)[0].dtype == jnp.float16
    assert bnjax.normalize(x, jnp.zeros(3), jnp.ones(3), scale).dtype == y.dtype


def test_float64_stays_float64():
    with jax.enable_x64(True):
        x, scale, bias, dy, _ = CASES[0].arrays()
        x = x.astype(np.float64) + 1e6
        want = oracle.batch_norm(x, scale, bias, dy, CASES[0].features)
        y, moments = bnjax.batch_norm(x, scale, bias)
        dx = jax.grad(lambda x: jnp.sum(bnjax.batch_norm(x, scale, bias)[0] * dy))(x)
        assert y.dtype == moments.var.dtype == dx.dtype == jnp.float64
        tol = tolerance(CASES[0], "float64")
        assert_close(moments.var, want.statistics.var, 1e-9, what="var")  # the oracle itself loses 1e12·2⁻⁵³ of x
        assert_close(y, want.y, 1e6 * tol, what="y")
        assert_close(dx, want.dx, 1e6 * tol, what="dx")


def test_update_running_against_the_oracle():
    rng = np.random.default_rng(0)
    old = rng.normal(size=(2, 5)).astype(np.float32)
    moments = bnjax.Moments(
        jnp.array([1.0, jnp.nan, 2.0, jnp.inf, 3.0]),
        jnp.array([1.0, 1.0, jnp.inf, 1.0, 2.0]),
        jnp.array([4.0, 4, 4, 4, 0]),
    )
    want = oracle.update_running(old, oracle.Statistics(*map(np.asarray, moments)), 0.9)
    running = bnjax.RunningStats(*map(jnp.asarray, old))
    got = bnjax.update_running(running, moments, momentum=0.9)
    for a, b in zip(got[:2], want, strict=True):
        assert_close(a, b, 4 * unit("float32"))
    traced = jax.jit(lambda m: bnjax.update_running(bnjax.RunningStats(*map(jnp.asarray, old)), moments, momentum=m))(
        0.9
    )
    assert_close(traced.mean, got.mean, 4 * unit("float32"))


def test_no_gradient_flows_into_running_statistics_or_mask():
    x = jnp.arange(12.0).reshape(4, 3) ** 1.5
    running = bnjax.RunningStats(jnp.zeros(3), jnp.ones(3))

    def through_running(x):
        new = bnjax.update_running(running, bnjax.batch_norm(x)[1])
        return jnp.sum(new.mean + new.var)

    def through_mask(w):
        y, m = bnjax.batch_norm(x, mask=w[:, None])
        return jnp.sum(y**2) + jnp.sum(m.var)

    assert not np.any(jax.grad(through_running)(x))
    assert not np.any(jax.grad(through_mask)(jnp.array([1.0, 0.5, 2.0, 1.0])))
