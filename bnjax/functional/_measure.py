"""Measures a batch: weighted sums over the rows of all devices, and a guard against what rounding does to them.

Sums about zero lose accuracy in proportion to mean²/var. So a batch is summed about zero first, and where that is not
good enough in some channel, it is summed again about the mean just found:

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
    """Holds which rows are pooled: the axes of x that are reduced over, and the devices."""

    layout: Layout
    group: _collectives.Group


class Measured(NamedTuple):
    """Holds the measured moments of a batch, per channel, without derivatives.

    Where squares of x overflow, x − K was multiplied by `unit` before it was squared, so that squares of values up to
    1e30 fit into float32. Elsewhere `unit` is 1.
    """

    K: jax.Array  # what was subtracted from x: 0, or the mean rounded to a few digits less
    e: jax.Array  # mean − K
    var: jax.Array  # unit²·variance
    unit: jax.Array  # 1 or a power of two
    inverse: jax.Array  # 1/unit, selected and not divided, for `once_per_channel`
    count: jax.Array | float | None  # type: ignore[assignment]  # W

    @property
    def resolved_var(self) -> jax.Array:
        """Returns the variance to divide by, times unit²: at least e²·2⁻²⁴, the size of the rounding of e squared.

        In a constant channel K may be a few units in the last place off. Then x − K and e differ only by rounding, the
        variance is 0, and 1/√ε would magnify that difference. No other channel is changed.
        """
        return jnp.maximum(self.var, squared(self.e * self.unit) * 2.0**-24)


def averages(
    c: jax.Array, weights: jax.Array | None, reduction: Reduction, W: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array | float]:
    """Returns Σwc/W, Σw|c|²/W and W of each channel, over the rows of all devices in the group, by one all-reduce.

    Args:
      c: `[..., C]` in the dtype of the statistics, real or complex.
      weights: bool or floating, of the rank of c, or None for 1. Where they are zero c may hold NaN.
      reduction: the axes and devices whose rows are pooled.
      W: the sum of the weights if it is known already, so that it is not summed again; unused without weights.

    Returns:
      Two arrays of the feature shape, and the count W: a Python number without weights, else an array of
      the feature shape.
    """
    (layout, group), rows = reduction, reduction.layout.rows
    if weights is None:
        sums = [jnp.sum(c, rows), jnp.sum(squared(c), rows)]
        count = math.prod(c.shape[a] for a in rows) * _collectives.group_size(group)
        first, second = _collectives.pool(sums, group)
        n = float(max(count, 1))  # a float, because the number of rows may exceed what an int32 holds
        return first / n, second / n, float(count)
    known = jnp.where(takes_part(weights), c, 0)  # NaN at weight 0 does not count
    weighted = known if weights.dtype == bool else weights * known
    squares = squared(known) if weights.dtype == bool else weights * squared(known)
    sums = [jnp.sum(weighted, rows), jnp.sum(squares, rows)]
    if W is None:
        first, second, total = _collectives.pool([*sums, _weight_sum(c, weights, layout)], group)
        W = _as_count(total)
    else:
        first, second = _collectives.pool(sums, group)
    rows_or_one = jnp.where(W == 0, 1, W)
    return first / rows_or_one, second / rows_or_one, W


def squared(z: jax.Array) -> jax.Array:
    """Returns |z|² as real numbers, also for complex z."""
    return lax.square(z.real) + lax.square(z.imag) if jnp.iscomplexobj(z) else lax.square(z)


def _weight_sum(c: jax.Array, weights: jax.Array, layout: Layout) -> jax.Array:
    """Returns Σw per channel; where weights are broadcast along an axis, their sum is multiplied by its length."""
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
      reduction: the axes and devices whose rows are pooled.
      floor: a variance below this need not be accurate; it is too small to change y.

    Returns:
      `Measured`, without derivatives.
    """
    x = lax.stop_gradient(x)
    dtype = statistics_dtype(x)
    largest = jnp.finfo(dtype).max
    e, square, count = averages(x.astype(dtype), weights, reduction)
    if isinstance(count, float) and count == 1:  # one row is its own mean, exactly
        one, zero = lax.full_like(square, 1), jnp.zeros_like(square)
        return Measured(e, jnp.zeros_like(e), zero, one, one, count)
    # |e|² ≤ 16·(var + floor), with var = square − |e|²; False for NaN too.
    near = (squared(e) * (1 + 1 / GUARD) <= square + floor) & (square <= largest)

    def about_the_mean() -> tuple[jax.Array, jax.Array]:
        """Returns e and the mean square of x − K, times unit and unit²: the sums about the mean found."""
        # Without the barrier XLA:GPU turns this conditional into a select, which always computes both branches. x
        # enters the branch in its own dtype, because the operands of a branch are written to memory.
        wide = lax.optimization_barrier(x).astype(dtype)
        unit, _ = _units(square, weights, count)
        centred = (wide - reduction.layout.expand(_rounded(e))) * reduction.layout.expand(unit)
        return averages(centred, *_of_sum_one(weights, count, reduction))[:2]

    # The branch receives only e and square. What is computed from them is computed again where it is used, because
    # XLA:CPU runs a program for each array that is written. Not the sums before the division: the branch could round
    # e otherwise, and then K would not be the same inside and outside. Channels that are near keep their first sums,
    # so that no channel depends on the values in another one. Select outside of the conditional: inside, XLA cannot
    # merge two identical calls.
    again = lax.cond(_everywhere(near), lambda: (e, square), about_the_mean)
    unit, inverse = _units(square, weights, count)
    K = once_per_channel(lax.select(near, jnp.zeros_like(e), _rounded(e) * unit), unit)
    e, square = (lax.select(near, old, new) for old, new in zip((e, square), again, strict=True))
    var = jnp.maximum(square - squared(e), 0)
    var = lax.select(var <= largest, var, lax.full_like(var, jnp.nan))
    return Measured(K, once_per_channel(e, unit), var, unit, inverse, count)


def once_per_channel(vector: jax.Array, unit: jax.Array) -> jax.Array:
    """Returns `vector / unit`, so that XLA:CPU computes the vector before it loops over x.

    XLA:CPU fuses a vector into such a loop with all that leads to it, back to an operation that it counts as expensive,
    such as a division, and then computes all that again for every element of x. A forward pass took up to 1.6 times as
    long. `unit` is a power of two, which makes the division exact. XLA learns it only when the program runs, so that it
    can neither remove the division nor turn it into a product.
    """
    if jnp.iscomplexobj(vector):
        return lax.complex(once_per_channel(vector.real, unit), once_per_channel(vector.imag, unit))
    return vector / unit


def _units(square: jax.Array, weights: jax.Array | None, count: jax.Array | float) -> tuple[jax.Array, jax.Array]:
    """Returns the factor `unit` by which x is multiplied so that its squares do not overflow, and 1/unit.

    Both are 1 where `square`, the mean square of x, is finite. Elsewhere unit is 2⁻⁸⁰ in float32, or 2⁻³⁰ where the
    sum of the weights is so large that it makes the sums overflow.
    """
    kind = jnp.finfo(square.dtype)
    for_values, for_weights = kind.maxexp * 5 // 8, kind.maxexp * 15 // 64

    def power(sign: int) -> jax.Array:
        """Returns unit for sign −1, and 1/unit for sign 1."""
        small = lax.full_like(square, 2.0 ** (sign * for_values))
        if weights is not None:
            small = jnp.where(count > float(kind.max) ** 0.5, 2.0 ** (sign * for_weights), small)
        return lax.select(square <= kind.max, lax.full_like(square, 1), small)

    return power(-1), power(1)


def _of_sum_one(
    weights: jax.Array | None, count: jax.Array | float, reduction: Reduction
) -> tuple[jax.Array | None, Reduction, jax.Array | None]:
    """Returns the weights, reduction and W for `averages`, with floating weights divided by their sum.

    The division keeps huge weights from overflowing; W is 1 then.
    """
    if not isinstance(count, jax.Array) or weights is None or weights.dtype == bool:
        return weights, reduction, count if isinstance(count, jax.Array) else None
    return weights / reduction.layout.expand(jnp.where(count == 0, 1, count)), reduction, jnp.ones_like(count)


@jax.custom_batching.custom_vmap
def _everywhere(flags: jax.Array) -> jax.Array:
    """Returns whether all flags are set; under `vmap`, whether all flags of all mapped batches are set.

    Under `vmap` the predicate of the conditional thus stays a scalar. With a batched predicate JAX would turn the
    conditional into a select and compute both branches in every step.
    """
    return jnp.all(flags)


@_everywhere.def_vmap
def _everywhere_vmap(size: int, batched: Sequence[bool], flags: jax.Array) -> tuple[jax.Array, bool]:
    """Returns the same scalar for all mapped batches (the rule of `vmap`), and False because it is not mapped."""
    return _everywhere(flags), False


def _rounded(mean: jax.Array) -> jax.Array:
    """Rounds to a multiple of 8 units in the last place, by an operation on the bits.

    XLA may compute K = sum/n again in the loop that writes y, and fuse it unrounded into x − K (a fused multiply-add).
    y would then use another K than e does, and a constant bfloat16 channel of 99840 would give 0.65 instead of 0. XLA
    cannot do this through an operation on the bits. Rounding also restores a constant that has few digits exactly.
    """
    if jnp.iscomplexobj(mean):
        return lax.complex(_rounded(mean.real), _rounded(mean.imag))
    bits = lax.bitcast_convert_type(mean, jnp.int64 if mean.dtype == jnp.float64 else jnp.int32)
    return lax.bitcast_convert_type((bits + 4) & ~7, mean.dtype)
