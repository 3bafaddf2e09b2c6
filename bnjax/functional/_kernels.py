"""The passes over the activation, each in the formulation that XLA compiles best.

Everything that touches all rows of x is here; the rest of the package works on per-channel vectors. K is the pivot:
a per-channel vector, of the shape that broadcasts against x, near the mean of x or zero. On TPU and GPU subtracting it
inside a sum is free, for these passes are bound by memory. On the CPU it takes the sum off XLA's library path: forward
and backward of a layer take about 1.6 times the time of four plain passes, 1.2 with plain sums. So there a
branch looks whether any K differs from zero before it pays (experiments/bench/pivot.py).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bnjax.functional._axes import Layout

Kernel = Callable[..., Any]  # (x, K, ...) -> what it makes of them

# Keeps the operands of a piece for its derivative, not its intermediates: a float32 copy of a bfloat16 x stays out of
# memory. Without barriers (prevent_cse), so that within one compiled program XLA fuses as it likes.
recompute = partial(jax.checkpoint, prevent_cse=False)


def _if_pivoted(pivoted: Kernel, plain: Kernel, x: jax.Array, K: jax.Array, *rest: jax.Array) -> Any:
    """pivoted(x, K, *rest); on the CPU plain(x, K, *rest), which may ignore K, where every K is zero."""

    def on_cpu(x: jax.Array, K: jax.Array, *rest: jax.Array) -> Any:
        return lax.cond(jnp.any(K != 0), pivoted, plain, x, K, *rest)

    return lax.platform_dependent(x, K, *rest, cpu=on_cpu, default=pivoted)


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
    if weights is None:
        return _if_pivoted(_pivoted_sums, _plain_sums, x, K)
    centred = jnp.where(weights > 0, x.astype(K.dtype) - K, 0)  # NaN at weight 0 takes no part
    weighted = centred if weights.dtype == bool else weights.astype(K.dtype) * centred
    return _sum(weighted, K), _sum(weighted * centred, K)


def _pivoted_sums(x: jax.Array, K: jax.Array) -> tuple[jax.Array, jax.Array]:
    centred = x.astype(K.dtype) - K
    return _sum(centred, K), _sum(centred * centred, K)


def _plain_sums(x: jax.Array, K: jax.Array) -> tuple[jax.Array, jax.Array]:
    """On the CPU. Half precision is converted for each sum by itself, behind one barrier and behind two.

    One conversion for both would be written to memory, in float32; one for each becomes part of its sum, which then
    stays with the library. The forward pass of a layer in bfloat16 takes a half to a third of the time, and less than
    in float32. (The backward pass still writes dy in float32: the branch of `_if_pivoted` is given it so.)
    """
    once = x if x.dtype == K.dtype else lax.optimization_barrier(x)
    twice = once if x.dtype == K.dtype else lax.optimization_barrier(once)
    once, twice = once.astype(K.dtype), twice.astype(K.dtype)
    return _sum(once, K), _sum(twice * twice, K)


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


@recompute
def tangent_affine(x: jax.Array, K: jax.Array, t_a: jax.Array, t_c: jax.Array) -> jax.Array:
    """(x − K)·t_a + t_c, for the derivative: what counts is its transpose, Σdy·(x − K) and Σdy over the rows.

    Recomputed twice over: inside the branches, lest they keep x − K; around them, for a branch hands on what it keeps,
    x itself, as a copy. A scan over ten layers needs 30 activations of memory so, 50 without the second.
    """
    return _if_pivoted(recompute(affine), recompute(_plain_affine), x, K, t_a, t_c)


def _plain_affine(x: jax.Array, K: jax.Array, a: jax.Array, c: jax.Array) -> jax.Array:
    return x.astype(K.dtype) * a + c


def readable(x: jax.Array, mask: jax.Array | None, mean: jax.Array | None = None) -> jax.Array:
    """x, with NaN and Inf at positions of weight zero read as the mean: neither they nor their derivatives get out."""
    if mask is None or mean is None:
        return x
    x = x.astype(mean.dtype)
    return jnp.where((mask > 0) | jnp.isfinite(x), x, mean)
