"""Measures a batch: weighted sums over the rows of all devices, and a guard against what rounding does to them.

Sums about zero lose about mean²/var of their digits. So a batch is summed about zero first, and where that is not good
enough in some channel, it is summed again about the mean just found:

    K = 0 or the rounded mean,   e = Σw(x − K) / W,   var = Σw|x − K|² / W − |e|²,   mean = K + e,   W = Σw.

Every device takes the second branch together, because the predicate is computed from pooled sums. It costs one more
read of x and one more all-reduce, in the steps that need it.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

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
    kind = jnp.finfo(dtype)
    e, square, count = averages(x.astype(dtype), weights, reduction)
    var = jnp.maximum(square - squared(e), 0)
    one = lax.full_like(var, 1)
    if isinstance(count, float) and count == 1:  # one row is its own mean, exactly
        return Measured(e, jnp.zeros_like(e), jnp.zeros_like(var), one, count)
    fits = var <= kind.max  # false for NaN too
    far = ~((squared(e) <= GUARD * (var + floor)) & fits)
    K = lax.select(far, _rounded(e), jnp.zeros_like(e))
    unit = jnp.where(fits, one, _shrinking(kind, weights, count))

    def about_the_mean() -> tuple[jax.Array, jax.Array]:
        # The barrier keeps XLA:GPU from making a select of this conditional, which would always run both branches, and
        # x crosses it in its own dtype, because whatever a branch is handed is written to memory.
        wide = lax.optimization_barrier(x).astype(dtype)
        centred = (wide - reduction.layout.expand(K)) * reduction.layout.expand(unit)
        rest, square, _ = averages(centred, *_of_sum_one(weights, count, reduction))
        return rest, jnp.maximum(square - squared(rest), 0)

    # Channels that are not far keep their first sums, so that none depends on what another one holds. The selection
    # stands outside of the conditional: inside, XLA could not merge two equal calls.
    again = lax.cond(_anywhere(far), about_the_mean, lambda: (e, var))
    e, var = (lax.select(far, new, old) for new, old in zip(again, (e, var), strict=True))
    return Measured(K, e, lax.select(var <= kind.max, var, lax.full_like(var, jnp.nan)), unit, count)


def _shrinking(kind: Any, weights: jax.Array | None, count: jax.Array | float) -> jax.Array | float:
    """Returns the factor for values whose squares, or weighted squares, overflow: 2⁻⁸⁰, or 2⁻³⁰, in float32."""
    for_values, for_weights = 2.0 ** -(kind.maxexp * 5 // 8), 2.0 ** -(kind.maxexp * 15 // 64)
    return for_values if weights is None else jnp.where(count > float(kind.max) ** 0.5, for_weights, for_values)


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
def _anywhere(flags: jax.Array) -> jax.Array:
    """Returns whether any flag is set, under `vmap` in any of the mapped batches.

    The predicate of a conditional stays one number this way, and the conditional stays one: with a batched predicate
    JAX would compute both branches in every step of an ensemble.
    """
    return jnp.any(flags)


@_anywhere.def_vmap
def _anywhere_vmap(size: int, batched: Sequence[bool], flags: jax.Array) -> tuple[jax.Array, bool]:
    return _anywhere(flags), False


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
