"""Tests derivatives in float64, in both modes and to second order, against autodiff and finite differences.

Every derivative is taken of Σ y·h with an independent h, because Σ y and Σ y² hardly change under batch normalization,
so that their gradients would test nothing.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
from tests.support import naive
from tests.support.cases import CASES, assert_close, by_name, tolerance, unit

# Float64 shows errors far above rounding; bfloat16 and float16 differ from float32 only in casts (test_dtypes).
EXACT = [c for c in CASES if c.dtype == "float32" and c.rows < 1000]
TOLERANCE = 1e-9  # float64: 2⁻⁵³ times the rows, 100² for `offset`, and 1/√ε for channels without rows


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def _setup(case):
    x, scale, bias, h, mask = case.arrays()
    args = tuple(jnp.asarray(a, jnp.float64) for a in (x, scale, bias))
    h = jnp.asarray(h, jnp.float64)

    def ours(x, scale, bias):
        return bnjax.batch_norm(x, scale, bias, axis=case.axis, mask=mask)[0]

    def textbook(x, scale, bias):
        return naive.batch_norm(x, scale, bias, case.features, mask=mask)

    return args, h, ours, textbook


def _close(a, b):
    jax.tree.map(lambda a, b: assert_close(a, b, TOLERANCE, 1 + np.max(np.abs(b), initial=0)), a, b)


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_gradient(case):
    args, h, ours, textbook = _setup(case)
    grads = [jax.jit(jax.grad(lambda *a, f=f: jnp.sum(f(*a) * h), (0, 1, 2)))(*args) for f in (ours, textbook)]
    _close(*grads)


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_forward_mode(case):
    args, h, ours, textbook = _setup(case)
    tangents = (h, args[1] * 0.3 - 1, args[2] * 0.7 + 1)
    if not np.isfinite(args[0]).all():
        tangents = (jnp.where(jnp.isfinite(args[0]), h, 0), *tangents[1:])
    _close(*(jax.jit(partial(jax.jvp, f))(args, tangents) for f in (ours, textbook)))


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_second_order(case):
    """Checks Hessian-vector products, forward over reverse and reverse over reverse, in all arguments at once."""
    args, h, ours, textbook = _setup(case)
    v = (jnp.cos(h), args[1] * 0.3 - 1, args[2] * 0.7 + 1)

    @partial(jax.jit, static_argnums=0)
    def products(f):
        def loss(*a):
            return jnp.sum(jnp.sin(f(*a)) * h)

        gradient = jax.grad(loss, (0, 1, 2))
        forward = jax.jvp(gradient, args, v)[1]

        def along(*a):
            return sum(jnp.vdot(g, t) for g, t in zip(gradient(*a), v, strict=True))

        return forward, jax.grad(along, (0, 1, 2))(*args)

    (f, r), (want, _) = products(ours), products(textbook)
    _close(f, want)
    _close(r, want)


@pytest.mark.parametrize("case", [c for c in EXACT if c.mask is None], ids=str)
def test_finite_differences(case):
    args, h, ours, _ = _setup(case)
    direction = (jnp.sin(3 * h), args[1] * 0.3 - 1, args[2] * 0.7 + 1)

    @jax.jit
    def along(t):
        return jnp.sum(ours(*(a + t * d for a, d in zip(args, direction, strict=True))) * h)

    step = 1e-5
    difference = (along(step) - along(-step)) / (2 * step)
    slope = jax.jvp(along, (0.0,), (1.0,))[1]
    assert_close(slope, difference, 1e-6, 1 + np.sum(np.abs(h)))  # step² for the cubic term, 1e-16·Σ|y·h|/step


SOME = [by_name(name) for name in ("image", "masked_rows", "masked_positions", "float_weights", "nan_padding")]


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
@pytest.mark.parametrize("offset", [0.0, 50.0])
@pytest.mark.parametrize("case", SOME, ids=str)
def test_dtypes(case, offset, dtype):
    """Checks every dtype and mask, near zero and where the guard is taken, in forward and reverse mode."""
    (x, scale, bias), h, _, textbook = _setup(case)
    x, h = (x + offset).astype(dtype), h.astype(dtype)
    vectors = (v.astype(jnp.promote_types(dtype, jnp.float32)) for v in (scale, bias))
    args, exact = (x, *vectors), (x.astype(jnp.float64), scale, bias)

    def ours(x, scale, bias):
        options = dict(axis=case.axis, mask=case.arrays()[-1], dtype=x.dtype)
        return bnjax.batch_norm(x, scale, bias, **options)[0]

    reverse = jax.jit(lambda h, *args: jax.vjp(ours, *args)[1](h))(h, *args)
    wanted = jax.vjp(textbook, *exact)[1](h.astype(jnp.float64))
    rough = max(2 * unit(dtype), TOLERANCE)  # dx is rounded with one more digit and then without it; one unit is 2⁻⁹
    assert_close(reverse[0], wanted[0], rough, 1 + np.max(np.abs(wanted[0])))
    sums = max(tolerance(case), TOLERANCE) if dtype != "float64" else TOLERANCE
    for actual, want in zip(reverse[1:], wanted[1:], strict=True):
        assert_close(actual, want, sums, np.sum(np.abs(h.astype(jnp.float64))))

    t_x = jnp.where(jnp.isfinite(x), jnp.cos(h), 0).astype(dtype)
    _, forward = jax.jit(partial(jax.jvp, ours))(args, (t_x, *args[1:]))
    _, want = jax.jvp(textbook, exact, (t_x.astype(jnp.float64), scale, bias))
    assert_close(forward, want, 2 * rough, 1 + np.max(np.abs(want)))  # on the CPU each of three terms is rounded


@pytest.mark.parametrize("offset", [0.0, 50.0])
@pytest.mark.parametrize("case", [CASES[0], CASES[-2], CASES[13]], ids=str)
def test_moments_are_differentiable(case, offset):
    x, _, _, _, mask = case.arrays()
    x = jnp.asarray(x, jnp.float64) + offset
    weights = jnp.ones_like(x) if mask is None else jnp.broadcast_to(jnp.asarray(mask, x.dtype), x.shape)
    rows = tuple(a for a in range(x.ndim) if a not in case.features)

    def ours(x):
        m = bnjax.batch_moments(x, axis=case.axis, mask=mask)
        return jnp.sum(jnp.sin(m.mean) * jnp.cos(m.var))

    def textbook(x):
        x = jnp.where(weights > 0, x, 0)
        n = weights.sum(rows)
        mean = (weights * x).sum(rows) / n
        var = (weights * (x - jnp.expand_dims(mean, rows)) ** 2).sum(rows) / n
        return jnp.sum(jnp.sin(mean) * jnp.cos(var))

    _close(jax.jit(jax.grad(ours))(x), jax.jit(jax.grad(textbook))(x))


@pytest.mark.parametrize("case", [c for c in EXACT if c.mask is None], ids=str)
def test_gradient_lies_in_the_tangent_space(case):
    """Checks Σ dx = 0 and Σ dx·xhat = 0 (up to ε), because y is invariant to shift and scale of x."""
    (x, scale, bias), h, ours, _ = _setup(case)
    rows = tuple(a for a in range(x.ndim) if a not in case.features)
    dx = jax.jit(jax.grad(lambda x: jnp.sum(ours(x, scale, bias) * h)))(x)
    xhat = ours(x, jnp.ones_like(scale), jnp.zeros_like(bias))
    size = 1 + np.max(np.abs(dx)) * case.rows
    assert_close(dx.sum(rows), np.zeros(case.feature_shape), TOLERANCE, size)
    if case.rows > 1:
        assert_close((dx * xhat).sum(rows), np.zeros(case.feature_shape), 1e-4, size)  # ε / var = 1e-5


def test_transformations_agree():
    """Checks that jit, vmap, scan and checkpoint do not change the gradient."""
    (x, scale, bias), h, ours, _ = _setup(CASES[0])

    def grad(x, f=ours):
        return jax.grad(lambda x: jnp.sum(f(x, scale, bias) * h))(x)

    want = grad(x)  # op by op
    jitted = jax.jit(grad)
    _close(jitted(x), want)
    _close(jax.jit(lambda x: grad(x, jax.checkpoint(ours)))(x), want)
    stacked = jnp.stack([x, 2 * x + 1, x**2])
    each = jnp.stack([jitted(s) for s in stacked])
    _close(jax.jit(jax.vmap(grad))(stacked), each)
    _close(jax.lax.scan(lambda c, s: (c, grad(s)), 0, stacked)[1], each)
    _close(jax.jit(jax.vmap(jax.vmap(grad)))(stacked[None])[0], each)


def test_residuals_of_a_bfloat16_input_are_bfloat16():
    """Checks that the backward pass keeps only x, in its own dtype, and vectors."""
    with jax.enable_x64(False):
        x, scale = jnp.ones((64, 32, 32, 8), jnp.bfloat16), jnp.ones(8)
        _, pullback = jax.vjp(lambda x, s: bnjax.batch_norm(x, s, dtype=x.dtype)[0], x, scale)
        (kept,) = (r for r in jax.tree.leaves(pullback) if r.size >= x.size)
        assert kept.dtype == jnp.bfloat16
