"""Computes the mean, variance and count of a batch, differentiable in x."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bnjax.functional import _axes, _collectives
from bnjax.functional._derivative import value_of, widen
from bnjax.functional._measure import Measured, Reduction, averages, measure, once_per_channel, squared


class Moments(NamedTuple):
    r"""Mean, biased variance and count (the sum of the weights) of a batch per channel, in float32 at least.

    .. math::
        \mathrm{count} = \sum w, \qquad \mathrm{mean} = \frac{\sum w x}{\mathrm{count}}, \qquad
        \mathrm{var} = \frac{\sum w (x - \mathrm{mean})^2}{\mathrm{count}}

    Attributes:
      mean: `[C]`, the feature shape; complex where x is.
      var: `[C]`, real.
      count: `[C]`, real: the number of rows, or the sum of their weights.

    Examples:
      >>> import jax.numpy as jnp, bnjax
      >>> mean, var, count = bnjax.batch_moments(jnp.array([[1.0], [3.0]]))
      >>> print(mean, var, count)
      [2.] [1.] [2.]
    """

    mean: jax.Array  # [C] (the feature shape)
    var: jax.Array  # [C]
    count: jax.Array  # type: ignore[assignment]  # [C]; hides the method tuple.count


def batch_moments(
    x: jax.Array,
    *,
    axis: int | Sequence[int] = -1,
    mask: jax.Array | None = None,
    axis_name: _collectives.AxisName = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Moments:
    r"""Computes mean, biased variance and count of each channel over all rows of all devices.

    With weights :math:`w` (1 without a mask), :math:`W = \sum w`:

    .. math:: \mathrm{mean} = \frac1W \sum w x, \qquad \mathrm{var} = \frac1W \sum w (x - \mathrm{mean})^2

    Differentiable in x to any order; no gradient flows to `mask`. It takes one read of x and one all-reduce of
    at most 3C numbers, and one more of each where the mean of a channel lies more than 4 standard deviations from zero:
    then the batch is summed again about its mean, because sums about zero would lose the digits of the variance.

    Args:
      x: `[..., C]`, any dtype; statistics are computed in float32 at least. A complex x has a complex mean and the
        real variance E\|x − mean\|², as in Flax.
      axis: the feature axis or axes; all others are reduced over.
      mask: non-negative weights (bool, integer or float), broadcastable to x. Positions of weight zero do not count,
        even where they hold NaN or Inf. A weight that is negative, NaN or Inf is an error in a NumPy array or list; in
        a jax.Array, whose values a trace cannot see, it makes the moments of its channels NaN.
      axis_name: name, or names, of the mapped axes (`shard_map`, `pmap`, `vmap`) whose rows are pooled. None under
        plain `jit`, where a sharded array is pooled over all its shards anyway.
      axis_index_groups: groups of indices along `axis_name`, of one size, that pool among themselves.

    Returns:
      `Moments(mean, var, count)`, each of the feature shape. Where the count is zero, mean and var are 0. They are NaN
      where float32 cannot hold the sum of the values or of the weights; a variance over 3e38 is Inf.

    Raises:
      ValueError: axes, mask or groups do not fit x, or `axis_name` is not bound.
      TypeError: the mask is complex, or x holds no numbers.

    Examples:
      >>> import jax.numpy as jnp, bnjax
      >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0], [jnp.nan, 0.0]])
      >>> m = bnjax.batch_moments(x, mask=jnp.array([[True], [True], [False]]))
      >>> print(m.mean, m.var, m.count)
      [ 2. 20.] [  1. 100.] [2. 2.]

    References:
      Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167, algorithm 1. Chan, Golub & LeVeque 1983, "Algorithms for
      Computing the Sample Variance", on shifted data.
    """
    x = _axes.as_input(x)
    layout = _axes.layout_of(x, axis)
    group = _collectives.group_of(axis_name, axis_index_groups, x.shape)
    weights = _axes.as_weights(_axes.as_mask(mask, x), x)
    return _batch_moments(Reduction(layout, group), x, weights)


@partial(jax.jit, static_argnums=0)
def _batch_moments(reduction: Reduction, x: jax.Array, weights: jax.Array | None) -> Moments:
    """Computes the moments of a batch, given checked arguments; traced once per shape."""
    batch = measure(x, weights, reduction, floor=0.0)
    rstd = scaled_rstd(batch, 0.0)
    z = (widen(x) - reduction.layout.expand(batch.K)) * reduction.layout.expand(rstd)
    return moments_of(batch, rstd, *formula_of(batch, rstd, z, weights, reduction))


def formula_of(
    batch: Measured, rstd: jax.Array, z: jax.Array, weights: jax.Array | None, reduction: Reduction
) -> tuple[jax.Array, jax.Array]:
    """Returns mean and variance of z = (x − K)·rstd, with the values measured and the derivative of the formula.

    The formula of the variance contains the measured mean, so that the sums of the formula are needed for tangents only
    and XLA removes them from the forward pass.

    Args:
      batch: the measured moments of x.
      rstd: `[C]`, the factor of z, a constant.
      z: `[..., C]`.
      weights: as in `averages`.
      reduction: the axes and devices whose rows are pooled.
    """
    known = batch.count if isinstance(batch.count, jax.Array) else None
    mean, square, _ = averages(z, weights, reduction, known)
    mean = value_of(batch.e * rstd, mean)
    return mean, value_of(batch.resolved_var * squared(rstd * batch.inverse), square - squared(mean))


def scaled_rstd(batch: Measured, epsilon: float) -> jax.Array:
    """Returns 1/√(var + ε): finite also where var is 0 or overflows, NaN where it would underflow (std over 1e37)."""
    least = jnp.finfo(batch.var.dtype).tiny
    var = jnp.maximum(batch.resolved_var + epsilon * squared(batch.unit), least)
    # Not `var <= (unit / least)²`: for one channel XLA computes unit² · least⁻², and both are out of range.
    fits = jax.lax.rsqrt(var) * batch.unit >= least
    return once_per_channel(jax.lax.rsqrt(jax.lax.select(fits, var, jax.lax.full_like(var, jnp.nan))), batch.inverse)


def moments_of(batch: Measured, rstd: jax.Array, mean: jax.Array, var: jax.Array) -> Moments:
    """Returns the moments of x, with the values measured and the derivative of the formula.

    Args:
      batch: the measured moments.
      rstd: the factor of z = (x − K)·rstd, a constant.
      mean: the formula's mean of z.
      var: the formula's variance of z.
    """
    count = batch.count if isinstance(batch.count, jax.Array) else jnp.full_like(batch.var, float(batch.count or 0))
    return Moments(
        value_of(batch.K + batch.e, batch.K + mean / rstd),
        value_of(batch.var * batch.inverse * batch.inverse, var / rstd / rstd),
        count,
    )
