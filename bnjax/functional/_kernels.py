"""The passes over the activation, each in the formulation that XLA compiles best.

Everything that touches all rows of x is here; the rest of the package works on per-channel vectors. K is the pivot:
a per-channel vector, of the shape that broadcasts against x, near the mean of x or zero.

On TPU and GPU these passes are bound by memory, and whatever happens to x inside a sum is free. On the CPU XLA hands
sums to a library at the speed of memory, but what two of them share it writes to memory first: x − K, the conversion of
a half precision x, even K at all positions. So there a branch looks whether the plainest sums will do, and each sum has
copies of its own. They are none: barriers of different depth, lest XLA find them equal (experiments/bench/tried.py).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bnjax.functional._axes import Layout

Kernel = Callable[..., Any]  # (x, K, ...) -> what it makes of them

# Keeps the operands of a piece for its derivative, not its intermediates: a float32 copy of a bfloat16 x stays out of
# memory. Without barriers (prevent_cse), so that within one compiled program XLA fuses as it likes.
recompute = partial(jax.checkpoint, prevent_cse=False)


def _where_plain(plain: Kernel, general: Kernel, x: jax.Array, mask: jax.Array | None, K: jax.Array, *rest: Any) -> Any:
    """plain(x, mask, K, *rest) where every K is zero and all padding readable, so that it need look at neither."""
    alike = jnp.all(K == 0)
    if mask is not None:
        alike &= jnp.all(jnp.isfinite(_sum(_own(x.dtype != K.dtype, x)[0].astype(K.dtype), K)))
    return lax.cond(alike, plain, general, x, mask, K, *rest)


def _own(number: int, *arrays: Any) -> tuple[Any, ...]:
    """Copies of the arrays, for the sum of that number: the same arrays behind so many barriers."""
    for _ in range(number):
        arrays = lax.optimization_barrier(arrays)
    return arrays


def _sum(x: jax.Array, like: jax.Array) -> jax.Array:
    """The sum of x over the axes on which `like` has size 1 (keeping them)."""
    axes = tuple(a for a in range(x.ndim) if like.shape[a] == 1 and x.shape[a] != 1)
    return jnp.sum(x, axes, keepdims=True)


def weight_sum(x: jax.Array, weights: jax.Array, layout: Layout, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Σw per channel; an axis over which the weights are broadcast counts by its length, without being read."""
    repeats = math.prod(x.shape[a] for a in layout.rows if weights.shape[a] == 1)
    sums = jnp.sum(weights, layout.rows, dtype=dtype) * repeats
    return jnp.broadcast_to(sums, layout.shape)


def row_sums(x: jax.Array, weights: jax.Array | None, K: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Σw(x − K) and Σw(x − K)², of the shape of K."""
    general = _general_sums if weights is not None else _apart_sums
    on_cpu = partial(_where_plain, _plain_sums, general)
    return lax.platform_dependent(x, weights, K, cpu=on_cpu, default=_general_sums)


def _general_sums(x: jax.Array, weights: jax.Array | None, K: jax.Array) -> tuple[jax.Array, jax.Array]:
    if weights is None:
        centred = x.astype(K.dtype) - K
        return _sum(centred, K), _sum(centred * centred, K)
    centred = jnp.where(weights > 0, x.astype(K.dtype) - K, 0)  # NaN at weight 0 takes no part
    weighted = centred if weights.dtype == bool else weights.astype(K.dtype) * centred
    return _sum(weighted, K), _sum(weighted * centred, K)


def _apart_sums(x: jax.Array, _: None, K: jax.Array) -> tuple[jax.Array, jax.Array]:
    """On the CPU: the same without weights."""
    once, twice = (x.astype(K.dtype) - K for x, K in (_own(1, x, K), _own(2, x, K)))
    return _sum(once, K), _sum(twice * twice, K)


def _plain_sums(x: jax.Array, weights: jax.Array | None, K: jax.Array) -> tuple[jax.Array, jax.Array]:
    """On the CPU: Σwx and Σwx². Of a product of two alone XLA would make a product of matrices, which is slower."""
    if weights is None:
        once, twice = (_own(i * (x.dtype != K.dtype), x)[0].astype(K.dtype) for i in (1, 2))
        return _sum(once, K), _sum(twice * twice, K)
    x1, w1, one = _own(1, x, weights.astype(K.dtype), jnp.ones_like(K))
    x2, w2 = _own(2, x, weights.astype(K.dtype))
    once, twice = x1.astype(K.dtype), x2.astype(K.dtype)
    return _sum(w1 * once * one, K), _sum(w2 * twice * twice, K)


def scaled_row_sums(
    x: jax.Array, weights: jax.Array | None, K: jax.Array, unit: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Σwu(x − K) and Σw(u(x − K))²: the same sums where squares of x would overflow."""
    centred = (x.astype(K.dtype) - K) * unit
    if weights is None:
        return _sum(centred, K), _sum(centred * centred, K)
    return row_sums(centred, weights, jnp.zeros_like(K))


def widened(t_x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """t_x in the dtype of the statistics; transposed, the terms of dx are added there and rounded once, at the end.

    XLA:TPU writes y and dx in one pass over x only where dx does not end in a conversion: a layer in bfloat16 makes 7
    passes then, and 8 otherwise. So it ends in a reduction of precision that leaves one more digit than there is.
    """
    kind = jnp.finfo(t_x.dtype)
    if kind.bits < jnp.finfo(dtype).bits:
        t_x = lax.reduce_precision(t_x, exponent_bits=kind.nexp, mantissa_bits=kind.nmant + 1)
    return t_x.astype(dtype)


@recompute
def tangent_sums(x: jax.Array, weights: jax.Array | None, K: jax.Array, t_x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Σw·t_x and Σw(x − K)·t_x, linear in t_x: the derivative of `row_sums` (but for a factor 2)."""
    centred, t_x = x.astype(K.dtype) - K, t_x.astype(K.dtype)
    if weights is not None:
        centred, t_x = jnp.where(weights > 0, centred, 0), jnp.where(weights > 0, t_x, 0)
        t_x = t_x if weights.dtype == bool else weights.astype(K.dtype) * t_x
    return _sum(t_x, K), _sum(centred * t_x, K)


def affine(x: jax.Array, K: jax.Array, a: jax.Array, c: jax.Array) -> jax.Array:
    """y = (x − K)·a + c."""
    return (x.astype(K.dtype) - K) * a + c


@partial(recompute, static_argnums=0)
def tangent_affine(
    dtype: np.dtype,
    x: jax.Array,
    mask: jax.Array | None,
    vectors: tuple[jax.Array, ...],
    t_x: jax.Array,
    tangents: tuple[jax.Array, ...],
) -> jax.Array:
    """t_x·a + (x − K)·t_a + t_c, for the derivative: what counts is its transpose, Σdy·(x − K) and Σdy over the rows.

    `vectors` are K and a, `tangents` those of a and c; with a mask both end with the mean, which unreadable padding is
    read as. Recomputed twice over: inside the branches, lest they keep x − K; around them, for a branch hands on what
    it keeps, x itself, as a copy. A scan over ten layers needs 30 activations of memory so, 50 without the second.

    On the CPU dy goes into the branch in its own dtype, for a branch is given arrays from memory: a float32 copy of a
    bfloat16 dy would be one. Forward mode pays for it with a rounding of each term.
    """
    (K, a, *mean), (t_a, t_c, *t_mean) = vectors, tangents
    rest = (t_a, t_c, *mean, *(t * a for t in t_mean))

    def on_cpu(x: jax.Array, mask: jax.Array | None, K: jax.Array, t_x: jax.Array, *rest: jax.Array) -> jax.Array:
        kernels = _plain_affine, _general_affine if mask is not None else _apart_affine
        plain, general = (recompute(partial(kernel, dtype)) for kernel in kernels)
        return (_read(t_x, x, mask) * a).astype(dtype) + _where_plain(plain, general, x, mask, K, *rest)

    def elsewhere(x: jax.Array, mask: jax.Array | None, K: jax.Array, t_x: jax.Array, *rest: jax.Array) -> jax.Array:
        return (_read(t_x, x, mask) * a + _general_affine(K.dtype, x, mask, K, *rest)).astype(dtype)

    return lax.platform_dependent(x, mask, K, t_x, *rest, cpu=on_cpu, default=elsewhere)


def _plain_affine(dtype: np.dtype, x: jax.Array, mask: jax.Array | None, K: jax.Array, *rest: jax.Array) -> jax.Array:
    """On the CPU: x·a + c."""
    return _apart_affine(dtype, x, mask, None, *rest)


def _apart_affine(
    dtype: np.dtype,
    x: jax.Array,
    mask: jax.Array | None,
    K: jax.Array | None,
    a: jax.Array,
    c: jax.Array,
    *_: jax.Array,
) -> jax.Array:
    """On the CPU: (x − K)·a + c; in a lower dtype each term by itself, so that dy is converted for each by itself."""
    (x,), c = _own(x.dtype != a.dtype, x), jnp.broadcast_to(c, x.shape)
    product = (x.astype(a.dtype) if K is None else x.astype(a.dtype) - K) * a
    if dtype == a.dtype:
        return product + c
    return _own(1, product.astype(dtype))[0] + _own(2, c.astype(dtype))[0]


def _general_affine(
    dtype: np.dtype, x: jax.Array, mask: jax.Array | None, K: jax.Array, a: jax.Array, c: jax.Array, *mean: jax.Array
) -> jax.Array:
    """(x − K)·a + c; unreadable padding is read as the mean, and adds what follows it, the mean's tangent times a."""
    y = affine(readable(x, mask, *mean[:1]), K, a, c)
    return (y if mask is None else jnp.where(_is_readable(x, mask), y, y + mean[1])).astype(dtype)


def readable(x: jax.Array, mask: jax.Array | None, mean: jax.Array | None = None) -> jax.Array:
    """x, with NaN and Inf at positions of weight zero read as the mean: neither they nor their derivatives get out."""
    if mask is None or mean is None:
        return x
    x = x.astype(mean.dtype)
    return jnp.where(_is_readable(x, mask), x, mean)


def _is_readable(x: jax.Array, mask: jax.Array) -> jax.Array:
    return (mask > 0) | jnp.isfinite(x)


def _read(t_x: jax.Array, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    return t_x if mask is None else jnp.where(_is_readable(x, mask), t_x, 0)
