"""Measures a batch: weighted sums over the rows of all devices, and a guard against what rounding does to them.

Sums about zero lose about mean²/var of their digits. So a batch is summed about zero first, and where that is not good
enough in some channel, it is summed again about the mean just found:

    K = 0 or the rounded mean,   e = Σw(x − K) / W,   var = Σw|x − K|² / W − |e|²,   mean = K + e,   W = Σw.

Every device takes the second branch together, because the predicate is computed from pooled sums. It costs one more
read of x and one more all-reduce, in the steps that need it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bnjax.functional import _collectives
from bnjax.functional._axes import Layout, statistics_dtype, takes_part

# The guard acts where |mean|² > 16·var. The sums are right to a few units of 6e-8, so var is right to 16 times that.
GUARD = 16.0


class Reduction(NamedTuple):
    """The rows that are pooled: which axes of x, and which devices."""

    layout: Layout
    group: _collectives.Group


class Measured(NamedTuple):
    """The moments of a batch as they were measured, none of them differentiable; per channel.

    Where the guard acted, everything that was squared carries the factor `unit`, so that squares of values up to 1e30
    fit into float32.
    """

    K: jax.Array  # what was subtracted from x: 0, or the mean rounded to a few digits less
    e: jax.Array  # unit·(mean − K)
    var: jax.Array  # unit²·variance
    unit: jax.Array  # 1 or a power of two
    inverse: jax.Array  # 1/unit; XLA:CPU runs a division as a program of its own, and fuses a multiplication
    count: jax.Array | float | None  # type: ignore[assignment]  # W

    @property
    def resolved_var(self) -> jax.Array:
        """Returns the variance to divide by: not less than what rounding makes of e.

        In a constant channel, of whose value K is a few units off, x − K and e are equal but for rounding, and the
        variance is 0. This keeps the difference from being magnified by 1/√ε; it changes no other channel.
        """
        return jnp.maximum(self.var, squared(self.e) * 2.0**-24)


def averages(
    c: jax.Array, weights: jax.Array | None, reduction: Reduction, W: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array | float]:
    """Returns Σwc/W, Σw|c|²/W and W of each channel, over the rows of all devices in the group: one all-reduce.

    Args:
      c: `[..., C]` in the dtype of the statistics, real or complex.
      weights: bool or floating, of the rank of c, or None for 1. Where they are zero c may hold NaN.
      reduction: the rows.
      W: the sum of the weights, where it is known; with weights only.

    Returns:
      Two arrays of the feature shape, and the count: a number without weights, else an array of the feature shape.
    """
    (layout, group), rows = reduction, reduction.layout.rows
    if weights is None:
        sums = [jnp.sum(c, rows), jnp.sum(squared(c), rows)]
        count = math.prod(c.shape[a] for a in rows) * _collectives.group_size(group)
        first, second = _collectives.pool_together(sums, group)
        n = float(max(count, 1))  # a float: more rows than an int32 counts are divided right
        return first / n, second / n, float(count)
    known = jnp.where(takes_part(weights), c, 0)  # NaN at weight 0 takes no part
    weighted = known if weights.dtype == bool else weights * known
    squares = squared(known) if weights.dtype == bool else weights * squared(known)
    sums = [jnp.sum(weighted, rows), jnp.sum(squares, rows)]
    if W is None:
        first, second, total = _collectives.pool_together([*sums, _weight_sum(c, weights, layout)], group)
        W = _as_count(total)
    else:
        first, second = _collectives.pool_together(sums, group)
    rows_or_one = jnp.where(W == 0, 1, W)
    return first / rows_or_one, second / rows_or_one, W


def squared(z: jax.Array) -> jax.Array:
    """Returns |z|², real also of a complex z."""
    return lax.square(z.real) + lax.square(z.imag) if jnp.iscomplexobj(z) else lax.square(z)


def _weight_sum(c: jax.Array, weights: jax.Array, layout: Layout) -> jax.Array:
    """Returns Σw per channel; an axis over which the weights are broadcast counts by its length, without being read."""
    repeats = math.prod(c.shape[a] for a in layout.rows if weights.shape[a] == 1)
    sums = jnp.sum(weights, layout.rows, dtype=c.real.dtype) * float(repeats)
    return _collectives.match(jnp.broadcast_to(sums, layout.shape), jnp.sum(c.real, layout.rows))


def _as_count(W: jax.Array) -> jax.Array:
    """Returns W, or NaN where the sum of the weights over- or underflows."""
    kind = jnp.finfo(W.dtype)
    return jnp.where((W == 0) | ((kind.tiny / kind.eps < W) & (kind.max >= W)), W, jnp.nan)


def measure(x: jax.Array, weights: jax.Array | None, reduction: Reduction, floor: float) -> Measured:
    """Measures the moments of a batch, accurate to rounding however far it lies from zero.

    Args:
      x: `[..., C]`, any floating or complex dtype.
      weights: as in `averages`.
      reduction: the rows.
      floor: a variance below this needs no accuracy of its own.
    """
    x = lax.stop_gradient(x)
    dtype = statistics_dtype(x)
    largest = jnp.finfo(dtype).max
    e, square, count = averages(x.astype(dtype), weights, reduction)
    if isinstance(count, float) and count == 1:  # one row is its own mean, exactly
        one, zero = lax.full_like(square, 1), jnp.zeros_like(square)
        return Measured(e, jnp.zeros_like(e), zero, one, one, count)
    # |e|² ≤ 16·(var + floor), with var = square − |e|²; false for NaN too.
    near = (squared(e) * (1 + 1 / GUARD) <= square + floor) & (square <= largest)

    def about_the_mean() -> tuple[jax.Array, jax.Array]:
        # The barrier keeps XLA:GPU from making a select of this conditional, which would always run both branches, and
        # x crosses it in its own dtype, because whatever a branch is handed is written to memory.
        wide = lax.optimization_barrier(x).astype(dtype)
        unit, _ = _units(square, weights, count)
        centred = (wide - reduction.layout.expand(_rounded(e))) * reduction.layout.expand(unit)
        return averages(centred, *_of_sum_one(weights, count, reduction))[:2]

    # The branch is handed e and square alone, and what follows of them is computed again where it is used, because
    # XLA:CPU runs a program for each array that is written. Channels that are near keep their first sums, so that none
    # depends on what another one holds. The selection stands outside: in the branch, XLA could not merge equal calls.
    again = lax.cond(_everywhere(near), lambda: (e, square), about_the_mean)
    K, units = lax.select(near, jnp.zeros_like(e), _rounded(e)), _units(square, weights, count)
    e, square = (lax.select(near, old, new) for old, new in zip((e, square), again, strict=True))
    var = jnp.maximum(square - squared(e), 0)
    return Measured(K, e, lax.select(var <= largest, var, lax.full_like(var, jnp.nan)), *units, count)


def _units(square: jax.Array, weights: jax.Array | None, count: jax.Array | float) -> tuple[jax.Array, jax.Array]:
    """Returns a factor under which squares do not overflow, and its inverse: 1 where `square` is finite.

    It is 2⁻⁸⁰ in float32 otherwise, and 2⁻³⁰ where the weights are so large that they make the sums overflow.
    """
    kind = jnp.finfo(square.dtype)
    for_values, for_weights = kind.maxexp * 5 // 8, kind.maxexp * 15 // 64

    def power(sign: int) -> jax.Array:
        small = lax.full_like(square, 2.0 ** (sign * for_values))
        if weights is not None:
            small = jnp.where(count > float(kind.max) ** 0.5, 2.0 ** (sign * for_weights), small)
        return lax.select(square <= kind.max, lax.full_like(square, 1), small)

    return power(-1), power(1)


def _of_sum_one(
    weights: jax.Array | None, count: jax.Array | float, reduction: Reduction
) -> tuple[jax.Array | None, Reduction, jax.Array | None]:
    """Returns the arguments of `averages` for the same weights, floating ones divided by their sum.

    Huge weights do not overflow then.
    """
    if not isinstance(count, jax.Array) or weights is None or weights.dtype == bool:
        return weights, reduction, count if isinstance(count, jax.Array) else None
    return weights / reduction.layout.expand(jnp.where(count == 0, 1, count)), reduction, jnp.ones_like(count)


@jax.custom_batching.custom_vmap
def _everywhere(flags: jax.Array) -> jax.Array:
    """Returns whether all flags are set, under `vmap` in all of the mapped batches.

    The predicate of a conditional stays one number this way, and the conditional stays one: with a batched predicate
    JAX would compute both branches in every step of an ensemble.
    """
    return jnp.all(flags)


@_everywhere.def_vmap
def _everywhere_vmap(size: int, batched: Sequence[bool], flags: jax.Array) -> tuple[jax.Array, bool]:
    return _everywhere(flags), False


def _rounded(mean: jax.Array) -> jax.Array:
    """Rounds to a multiple of 8 units in the last place, through the bits.

    XLA may compute K = sum/n again in the loop that writes y, and contract it with x − K unrounded: y would then use
    another K than e does, and a constant bfloat16 channel of 99840 would give 0.65 instead of 0. XLA does not look
    through the bits. Rounding also restores a constant of few digits exactly.
    """
    if jnp.iscomplexobj(mean):
        return lax.complex(_rounded(mean.real), _rounded(mean.imag))
    bits = lax.bitcast_convert_type(mean, jnp.int64 if mean.dtype == jnp.float64 else jnp.int32)
    return lax.bitcast_convert_type((bits + 4) & ~7, mean.dtype)
