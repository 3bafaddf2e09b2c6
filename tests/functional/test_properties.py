"""Tests laws that hold for every batch, on batches drawn by hypothesis."""

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bnjax
from tests.support.cases import assert_close, unit

settings.register_profile("laws", deadline=None, max_examples=12)
settings.load_profile("laws")

U = unit("float32")
values = st.floats(-100, 100, width=32).map(lambda v: np.float32(round(v, 3)))


SHAPES = st.sampled_from([(2, 1), (5, 3), (12, 2)])  # few, because each is compiled anew


def batches():
    return SHAPES.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=values))


def weights_for(x):
    return hnp.arrays(np.int32, (len(x), 1), elements=st.integers(0, 3))


def close(a, b, x):
    """Asserts that two moments agree: means to rounding of the values, variances to rounding of their squares."""
    size = 1 + np.max(np.abs(x))
    assert_close(a.mean, b.mean, 16 * U, size, "mean")
    assert_close(a.var, b.var, 64 * U, 1e-3 + np.asarray(b.var) + U * size**2, "var")
    assert_close(a.count, b.count, 4 * U, what="count")


def normalised(x, **options):
    return np.asarray(bnjax.batch_norm(jnp.asarray(x), **options)[0], np.float64)


def conditioning(x, epsilon=1e-5):
    """Returns by how much a rounding error of x grows in y: (|x| + 1)/√(var + ε)."""
    return float(np.max((np.abs(x).max(0) + 1) / np.sqrt(x.astype(np.float64).var(0) + epsilon)))


@given(batches(), st.randoms())
def test_permuting_rows_permutes_the_output(x, random):
    order = list(range(len(x)))
    random.shuffle(order)
    close(bnjax.batch_moments(x[order]), bnjax.batch_moments(x), x)
    assert_close(normalised(x[order]), normalised(x)[order], 64 * U, conditioning(x))


@pytest.mark.slow
@given(batches(), st.data())
def test_any_split_merges_to_the_whole(x, data):
    cut = data.draw(st.integers(0, len(x)))
    w = data.draw(weights_for(x))
    parts = [bnjax.batch_moments(x[s], mask=w[s]) for s in (slice(cut), slice(cut, None))]
    close(bnjax.merge_moments(*parts), bnjax.batch_moments(x, mask=w), x)


@given(batches(), batches(), batches())
def test_merging_is_associative_and_commutative(x, y, z):
    a, b, c = (bnjax.batch_moments(v[:, :1]) for v in (x, y, z))
    everything = np.concatenate([v[:, :1] for v in (x, y, z)])
    want = bnjax.batch_moments(everything)
    for merged in (
        bnjax.merge_moments(a, b, c),
        bnjax.merge_moments(a, bnjax.merge_moments(b, c)),
        bnjax.merge_moments(c, b, a),
    ):
        close(merged, want, everything)


@given(batches())
def test_empty_moments_are_neutral_whatever_they_hold(x):
    m = bnjax.batch_moments(x)
    nothing = jnp.zeros_like(m.count)
    for junk in (0.0, 7.0, np.nan, np.inf):
        empty = bnjax.Moments(jnp.full_like(m.mean, junk), jnp.full_like(m.var, junk), nothing)
        for merged in (bnjax.merge_moments(m, empty), bnjax.merge_moments(empty, m)):
            for a, b in zip(merged, m, strict=True):
                assert_close(a, b, 0)
    assert not np.any(bnjax.merge_moments(empty, empty).count)


@given(st.data())
def test_a_weight_of_k_is_k_copies(data):
    x = data.draw(batches())
    w = data.draw(weights_for(x))
    copies = np.repeat(x, w[:, 0], axis=0)
    if len(copies):
        close(bnjax.batch_moments(x, mask=w), bnjax.batch_moments(copies), x)


@given(st.data())
def test_a_mask_is_the_rows_that_it_leaves(data):
    x = data.draw(batches())
    keep = data.draw(hnp.arrays(bool, (len(x), 1)))
    if keep.any():
        close(bnjax.batch_moments(np.where(keep, x, np.nan), mask=keep), bnjax.batch_moments(x[keep[:, 0]]), x)


@given(batches(), st.floats(-1e3, 1e3).map(np.float32))
def test_shifting_x_does_not_change_y(x, shift):
    shifted = x + shift
    back = shifted - shift  # the shifted x, rounded to float32
    assert_close(normalised(shifted), normalised(back), 256 * U, conditioning(shifted) ** 2 * conditioning(back))


@given(batches(), st.integers(-20, 20))
def test_scaling_x_and_epsilon_does_not_change_y(x, power):
    factor = np.float32(2.0**power)
    a, b = normalised(x * factor, epsilon=1e-5 * float(factor) ** 2), normalised(x)
    assert_close(a, b, 16 * U, 1 + conditioning(x))


@given(batches(), st.floats(-10, 10).map(np.float32), st.floats(-10, 10).map(np.float32))
def test_scale_and_bias_are_affine(x, scale, bias):
    channels = x.shape[1]
    y = normalised(x, scale=jnp.full(channels, scale), bias=jnp.full(channels, bias))
    size = 1 + abs(bias) + abs(scale) * conditioning(x)
    assert_close(y, normalised(x) * float(scale) + float(bias), 64 * U, size)


@pytest.mark.slow
@given(batches(), st.data())
def test_sharding_does_not_matter(x, data):
    """Checks that a mapped axis, with any weights per part, gives the moments of the whole batch."""
    parts = data.draw(st.integers(2, 4))
    stacked = np.stack([np.roll(x, i, axis=0) * (i + 1) for i in range(parts)])
    w = np.stack([data.draw(weights_for(x)) for _ in range(parts)])
    pooled = jax.vmap(lambda x, w: bnjax.batch_moments(x, mask=w, axis_name="i"), axis_name="i")(stacked, w)
    whole, flat = stacked.reshape(-1, x.shape[1]), w.reshape(-1, 1)
    want = bnjax.batch_moments(whole, mask=flat)
    for i in range(parts):
        close(jax.tree.map(lambda a, i=i: a[i], pooled), want, whole)


@pytest.mark.slow
@given(st.data())
def test_the_gradient_is_orthogonal_to_shift_and_scale(data):
    """Checks Σ dx = 0, and that Σ dx·xhat is only what ε leaves: dx·xhat = rstd·ε·rstd²·Σ dy·xhat."""
    x = data.draw(batches())
    dy = np.random.default_rng(len(x)).normal(size=x.shape).astype(np.float32)
    dx = np.asarray(jax.grad(lambda x: jnp.sum(bnjax.batch_norm(x)[0] * dy))(jnp.asarray(x)), np.float64)
    xhat = normalised(x)
    wide = x.astype(np.float64)
    rstd = (wide.var(0) + 1e-5) ** -0.5
    size = rstd * len(x) * np.abs(dy).max() * (1 + np.abs(xhat).max()) ** 2
    assert_close(dx.sum(0), np.zeros(x.shape[1]), 64 * U, size)
    left = rstd * 1e-5 * rstd**2 * (dy * xhat).sum(0)
    assert_close((dx * xhat).sum(0), left, 64 * U, size * (1 + np.abs(xhat).max()) * conditioning(x))
