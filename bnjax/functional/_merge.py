"""Merges the moments of several batches into those of their union: given as arguments, or one on each device."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from bnjax.functional import _axes, _collectives
from bnjax.functional._measure import squared
from bnjax.functional._moments import Moments


def merge_moments(first: Moments, *others: Moments) -> Moments:
    r"""Merges the moments of disjoint sets of rows into those of all rows, exactly.

    .. math::
        n = \sum n_i, \qquad m = \frac1n \sum n_i m_i, \qquad
        v = \frac1n \sum n_i \bigl(v_i + (m_i - m)^2\bigr)

    Args:
      first, others: `Moments`, all of one feature shape, such as those of micro-batches, calls or hosts.

    Returns:
      `Moments` of the union. A part with count 0 contributes nothing, whatever its mean and var (NaN too).

    Raises:
      ValueError: the feature shapes differ.

    Examples:
      >>> import jax.numpy as jnp, bnjax
      >>> x = jnp.array([[0.0, 3.0], [4.0, 3.0], [8.0, 6.0], [0.0, 0.0]])
      >>> m = bnjax.merge_moments(bnjax.batch_moments(x[:3]), bnjax.batch_moments(x[3:]))
      >>> print(m.mean, m.count)
      [3. 3.] [4. 4.]

    References:
      Chan, Golub & LeVeque 1983, "Algorithms for Computing the Sample Variance".
    """
    merged, *parts = _axes.of_one_shape("moments to merge", first, *others)
    for part in parts:
        merged = _merge(merged, part)
    return merged


def _merge(p: Moments, q: Moments) -> Moments:
    """Returns the moments of the rows of p and q together."""
    count = p.count + q.count
    whole = jnp.where(count > 0, count, 1)
    # Divide for both shares: 1 - share would round a small share away. Step from the mean of the larger part, so that
    # the correction is small.
    share_p, share_q = p.count / whole, q.count / whole
    step = q.mean - p.mean
    mean = jnp.where(p.count >= q.count, p.mean + share_q * step, q.mean - share_p * step)
    var = share_p * p.var + share_q * q.var + share_p * share_q * squared(step)

    def pick(a: jax.Array, b: jax.Array, both: jax.Array) -> jax.Array:
        """Returns the merged value, or that of the other part where one part is empty."""
        return jnp.where(q.count == 0, a, jnp.where(p.count == 0, b, both))

    return Moments(pick(p.mean, q.mean, mean), pick(p.var, q.var, var), count)


def pool_moments(
    moments: Moments,
    *,
    axis_name: _collectives.AxisName,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    copies: int = 1,
) -> Moments:
    r"""Pools the moments that each device has of its own rows into those of all devices, by two all-reduces.

    The result is that of :func:`merge_moments` for the moments of all devices i:

    .. math::
        n = \sum n_i, \qquad m = \frac1n \sum n_i m_i, \qquad v = \frac1n \sum n_i \bigl(v_i + (m_i - m)^2\bigr)

    Use it where each device, or group of devices, normalises by its own moments, but the running averages shall follow
    the data of all devices.

    Args:
      moments: `Moments` of this device's rows, each `[C]`. With count 0 they contribute nothing, even if they are NaN.
      axis_name: name, or names, of the mapped axes to pool over.
      axis_index_groups: groups of indices along `axis_name`, of one size.
      copies: how many devices hold the same moments, because they were pooled over groups of this size before. The
        returned count is divided by it.

    Returns:
      `Moments`, the same on every device.

    Raises:
      ValueError: as for :func:`batch_moments`.

    Examples:
      >>> import jax, jax.numpy as jnp, bnjax
      >>> def both(x):
      ...     own = bnjax.batch_moments(x)
      ...     return own.mean, bnjax.pool_moments(own, axis_name="i").mean
      >>> own, pooled = jax.vmap(both, axis_name="i")(jnp.array([[[1.0], [3.0]], [[5.0], [7.0]]]))
      >>> print(own.ravel(), pooled.ravel())
      [2. 6.] [4. 4.]

    References:
      Chan, Golub & LeVeque 1983, "Algorithms for Computing the Sample Variance".
    """
    ((mean, var, n),) = _axes.of_one_shape("moments", moments)
    group = _collectives.group_of(axis_name, axis_index_groups, mean.shape)
    mean, var = jnp.where(n > 0, mean, 0), jnp.where(n > 0, var, 0)
    count, total = _collectives.pool([n, n * mean], group)
    whole = jnp.where(count > 0, count, 1)
    pooled = total / whole
    (spread,) = _collectives.pool([n * (var + squared(mean - pooled))], group)
    return Moments(pooled, spread / whole, count / copies)


def moments_for_running(
    moments: Moments,
    running: jax.Array,
    *,
    shape: tuple[int, ...],
    axis_name: _collectives.AxisName,
    stats_axis_name: _collectives.AxisName,
    axis_index_groups: Sequence[Sequence[int]] | None,
) -> Moments:
    """Returns the moments for the running averages.

    These are the moments of the normalization group or, with `stats_axis_name`, of all devices on those axes.

    Args:
      moments: `Moments` that normalised the batch, each `[C]`.
      running: `[C]`, the running mean.
      shape: of the batch, for the warning that running averages would come to differ between devices.
      axis_name: name, or names, of the axes over which `moments` are pooled already.
      stats_axis_name: name, or names, of the axes whose devices the running averages follow; None returns the moments
        as they are.
      axis_index_groups: the groups of indices along that axis over which `moments` are pooled already, or None.
    """
    if stats_axis_name is None:
        _collectives.warn_if_local(running, moments.mean, shape)
        return moments
    if axis_index_groups is not None:
        return pool_moments(moments, axis_name=stats_axis_name, copies=len(axis_index_groups[0]))
    apart = tuple(
        name for name in _collectives.names_of(stats_axis_name) if name not in _collectives.names_of(axis_name)
    )
    return pool_moments(moments, axis_name=apart) if apart else moments
