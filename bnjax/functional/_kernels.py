"""The passes over the activation, each in the formulation that XLA compiles best.

Everything that touches all rows of x is here; the rest of the package works on per-channel vectors. K is the pivot:
a per-channel vector, of the shape that broadcasts against x, near the mean of x or zero.

On TPU and GPU these passes are bound by memory, and whatever happens to x inside a sum is free. On the CPU XLA hands
plain sums, Σx and Σxy, to a library at the speed of memory, and nothing but these: a subtraction, a selection, or a
conversion or product that two sums share, costs half the time of a layer or all of it again. So there a branch looks
whether the plain sums will do, and each sum converts and weighs x for itself (experiments/bench/tried.py).
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


def _if_plain(plain: Kernel, general: Kernel, x: jax.Array, mask: jax.Array | None, K: jax.Array, *rest: Any) -> Any:
    """general(x, mask, K, *rest), or, on the CPU, plain(...) where that is the same."""
    return lax.platform_dependent(x, mask, K, *rest, cpu=partial(_where_plain, plain, general), default=general)


def _where_plain(plain: Kernel, general: Kernel, x: jax.Array, mask: jax.Array | None, K: jax.Array, *rest: Any) -> Any:
    """plain(x, mask, K, *rest) where every K is zero and no padding unreadable: then it may forget both."""
    alike = jnp.all(K == 0)
    if mask is not None:
        alike &= jnp.all(jnp.isfinite(_sum(_copies(x, K.dtype)[0], K)))
    return lax.cond(alike, plain, general, x, mask, K, *rest)


def _copies(x: jax.Array, dtype: jax.typing.DTypeLike, shared: bool = False) -> tuple[jax.Array, jax.Array]:
    """x two times in `dtype`: behind one barrier and behind two, so that XLA does not make one array of them.

    One conversion for two sums would be written to memory, in float32; one for each becomes part of its sum.
    """
    if x.dtype == dtype and not shared:
        return x, x
    once = lax.optimization_barrier(x)
    return once.astype(dtype), lax.optimization_barrier(once).astype(dtype)


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
    return _if_plain(_plain_sums, _general_sums, x, weights, K)


def _general_sums(x: jax.Array, weights: jax.Array | None, K: jax.Array) -> tuple[jax.Array, jax.Array]:
    centred = x.astype(K.dtype) - K
    if weights is None:
        return _sum(centred, K), _sum(centred * centred, K)
    centred = jnp.where(weights > 0, centred, 0)  # NaN at weight 0 takes no part
    weighted = centred if weights.dtype == bool else weights.astype(K.dtype) * centred
    return _sum(weighted, K), _sum(weighted * centred, K)


def _plain_sums(x: jax.Array, weights: jax.Array | None, K: jax.Array) -> tuple[jax.Array, jax.Array]:
    once, twice = _copies(x, K.dtype, shared=weights is not None)
    if weights is None:
        return _sum(once, K), _sum(twice * twice, K)
    w, v = _copies(weights.astype(K.dtype), K.dtype, shared=True)
    return _sum(w * once, K), _sum(v * twice * twice, K)


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
        plain, general = (recompute(partial(kernel, dtype)) for kernel in (_plain_affine, _general_affine))
        return (_read(t_x, x, mask) * a).astype(dtype) + _where_plain(plain, general, x, mask, K, *rest)

    def elsewhere(x: jax.Array, mask: jax.Array | None, K: jax.Array, t_x: jax.Array, *rest: jax.Array) -> jax.Array:
        return (_read(t_x, x, mask) * a + _general_affine(K.dtype, x, mask, K, *rest)).astype(dtype)

    return lax.platform_dependent(x, mask, K, t_x, *rest, cpu=on_cpu, default=elsewhere)


def _plain_affine(
    dtype: np.dtype, x: jax.Array, mask: jax.Array | None, K: jax.Array, a: jax.Array, c: jax.Array, *_: jax.Array
) -> jax.Array:
    """x·a + c, and each term by itself in a lower dtype, so that dy, the derivative of both, is converted twice."""
    x, c = _copies(x, K.dtype)[0], jnp.broadcast_to(c, x.shape)
    if dtype == K.dtype:
        return x * a + c
    once, twice = (x * a).astype(dtype), lax.optimization_barrier(c.astype(dtype))
    return lax.optimization_barrier(once) + lax.optimization_barrier(twice)


def _general_affine(
    dtype: np.dtype, x: jax.Array, mask: jax.Array | None, K: jax.Array, a: jax.Array, c: jax.Array, *mean: jax.Array
) -> jax.Array:
    """(x − K)·a + c; of the mean and its tangent times a, unreadable padding is read as the one and adds the other."""
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
