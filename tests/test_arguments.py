"""Bad arguments: a clear error at trace time, the same under jit and outside, never a silent broadcast."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax

X = jnp.ones((4, 5, 3))
V = jnp.ones(3)
STATS = bnjax.RunningStats(V, V)
MOMENTS = bnjax.Moments(V, V, V)

BAD = {
    "axis out of range": (lambda x: bnjax.batch_norm(x, axis=3), ValueError, r"axis=3 for x of shape \(4, 5, 3\)"),
    "axis out of range, negative": (lambda x: bnjax.batch_norm(x, axis=-4), ValueError, "axis=-4"),
    "axis repeated": (lambda x: bnjax.batch_norm(x, axis=(2, -1)), ValueError, "repeat"),
    "no axis": (lambda x: bnjax.batch_norm(x, axis=()), ValueError, "must not be empty"),
    "scalar x": (lambda x: bnjax.batch_norm(x[0, 0, 0]), ValueError, "axis"),
    "scale of another size": (lambda x: bnjax.batch_norm(x, jnp.ones(4)), ValueError, r"scale.*\(3,\).*\(4,\)"),
    "scale of one": (lambda x: bnjax.batch_norm(x, jnp.ones(1)), ValueError, "scale"),
    "scalar scale": (lambda x: bnjax.batch_norm(x, 2.0), ValueError, "scale"),
    "complex scale": (lambda x: bnjax.batch_norm(x, V + 1j), TypeError, "scale"),
    "bias of another rank": (lambda x: bnjax.batch_norm(x, V, V[None]), ValueError, "bias"),
    "pivot of another size": (lambda x: bnjax.batch_norm(x, pivot=jnp.ones(2)), ValueError, "pivot"),
    "mean of another size": (lambda x: bnjax.normalize(x, jnp.ones(1), V), ValueError, "mean"),
    "var of another size": (lambda x: bnjax.normalize(x, V, jnp.ones(1)), ValueError, "var"),
    "mean left out": (lambda x: bnjax.normalize(x, None, V), ValueError, "mean is needed"),
    "mask of another shape": (lambda x: bnjax.batch_norm(x, mask=jnp.ones((4, 3, 1))), ValueError, "broadcastable"),
    "mask without axes": (lambda x: bnjax.batch_norm(x, mask=jnp.ones((4, 5))), ValueError, r"mask\[\.\.\., None\]"),
    "mask of higher rank": (lambda x: bnjax.batch_norm(x, mask=jnp.ones((1, 4, 5, 3))), ValueError, "broadcastable"),
    "mask larger than x": (lambda x: bnjax.batch_norm(x[:1], mask=jnp.ones((4, 1, 1))), ValueError, "broadcastable"),
    "complex mask": (lambda x: bnjax.batch_norm(x, mask=x + 1j), TypeError, "mask"),
    "negative mask": (lambda x: bnjax.batch_norm(x, mask=-np.ones((4, 1, 1))), ValueError, "non-negative"),
    "NaN mask": (lambda x: bnjax.batch_norm(x, mask=np.full((4, 1, 1), np.nan)), ValueError, "non-negative"),
    "epsilon of zero": (lambda x: bnjax.batch_norm(x, epsilon=0.0), ValueError, "epsilon must be positive"),
    "negative epsilon": (lambda x: bnjax.normalize(x, V, V, epsilon=-1e-5), ValueError, "epsilon must be positive"),
    "NaN epsilon": (lambda x: bnjax.batch_norm(x, epsilon=float("nan")), ValueError, "epsilon must be positive"),
    "traced epsilon": (lambda x: jax.jit(lambda e: bnjax.batch_norm(x, epsilon=e))(1e-5), ValueError, "traced"),
    "integer output": (lambda x: bnjax.batch_norm(x, dtype=jnp.int32), TypeError, "floating"),
    "complex output": (lambda x: bnjax.normalize(x, V, V, dtype=jnp.complex64), TypeError, "floating"),
    "momentum over 1": (lambda x: bnjax.update_running(STATS, MOMENTS, momentum=1.5), ValueError, "weight of the OLD"),
    "negative momentum": (lambda x: bnjax.update_running(STATS, MOMENTS, momentum=-0.1), ValueError, "PyTorch"),
    "NaN momentum": (lambda x: bnjax.update_running(STATS, MOMENTS, momentum=float("nan")), ValueError, "momentum"),
    "moments of another size": (
        lambda x: bnjax.update_running(STATS, bnjax.Moments(V[:1], V[:1], V[:1])), ValueError, "one feature shape",
    ),
    "merge of two sizes": (
        lambda x: bnjax.merge_moments(MOMENTS, bnjax.Moments(V[:1], V[:1], V[:1])), ValueError, "one feature shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "transform", [lambda f: f, jax.jit, lambda f: lambda x: jax.eval_shape(f, x)], ids=["eager", "jit", "shape"]
)
@pytest.mark.parametrize("name", BAD)
def test_bad_argument(name, transform):
    f, error, message = BAD[name]
    with pytest.raises(error, match=message):
        transform(f)(X)


@pytest.mark.parametrize(
    "x",
    [
        [[1.0, 2.0], [3.0, 5.0]],
        np.asfortranarray(np.arange(12.0, dtype=np.float32).reshape(4, 3)),
        np.arange(24, dtype=np.float32).reshape(4, 6)[:, ::2],
        np.arange(12, dtype=np.uint8).reshape(4, 3),
        np.array([[True, False], [False, False]]),
    ],
    ids=["list", "fortran order", "strided", "uint8", "bool"],
)
def test_good_but_unusual(x):
    y, moments = bnjax.batch_norm(x)
    wide = np.asarray(x, np.float64)
    want = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)
    assert np.max(np.abs(np.asarray(y, np.float64) - want)) < 1e-5
    assert moments.count[0] == len(x)


def test_a_traced_negative_weight_counts_as_zero():
    x, w = jnp.arange(12.0).reshape(4, 3), jnp.array([[1.0], [-1.0], [jnp.nan], [2.0]])
    got = jax.jit(lambda w: bnjax.batch_moments(x, mask=w))(w)
    want = bnjax.batch_moments(x, mask=jnp.array([[1.0], [0.0], [0.0], [2.0]]))
    for a, b in zip(got, want, strict=True):
        assert np.array_equal(a, b)
