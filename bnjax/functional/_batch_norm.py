"""Batch normalization with the statistics of the batch: the training mode."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnjax.functional import _axes, _collectives, _kernels
from bnjax.functional._finish import Activation, as_activation, as_residual, finish, in_place_of
from bnjax.functional._moments import (
    Centred,
    Moments,
    Reduction,
    centred_moments,
    moments_of,
    moments_tangent,
    start_pivot,
)
from bnjax.functional._one_row import warn_of_one_row

# A variance below this part of epsilon changes nothing in y, so the guard need not sum again for it: a channel that is
# constant would otherwise set it off in every step.
_FLOOR = 1e-3


def batch_norm(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-5,
    mask: jax.Array | None = None,
    pivot: jax.Array | None = None,
    axis_name: _collectives.AxisName = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    activation: Activation = None,
    residual: jax.Array | None = None,
) -> tuple[jax.Array, Moments]:
    r"""Normalises x by the mean and variance of its own batch, pooled over devices.

    .. math:: y = \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}} \cdot \mathrm{scale} + \mathrm{bias}

    with the moments of :func:`bnjax.batch_moments`. One all-reduce forward, one backward. Exact from the first batch:
    in float32 the variance is right to 1e-5 for \|mean\|/std up to 1e4 and more, values up to 1e30 are standardised, a
    constant channel gives `bias`. A batch that lies more than 4 standard deviations from `pivot` costs one more read of
    x and one more all-reduce; pass the running mean as pivot and only the first steps of a training run are such (where
    a pivot counts, see :func:`bnjax.batch_moments`; elsewhere every step on such data).

    Args:
      x: `[..., C]`, any dtype. A complex x has a complex mean and the real variance E\|x − mean\|², as in Flax.
      scale: `[C]`, or None for 1.
      bias: `[C]`, or None for 0.
      axis: the feature axis or axes; all others are reduced over.
      epsilon: added to the variance; positive.
      mask: non-negative weights (bool, integer or float), broadcastable to x. Positions of weight zero take no part in
        the moments; their own output is the normalised value, and NaN or Inf there is read as the mean.
      pivot: `[C]`, a guess of the mean; it changes the rounding and the time, not the value. See `batch_moments`.
      axis_name: name, or names, of the mapped axes (`shard_map`, `pmap`, `vmap`) that share statistics. None under
        plain `jit`, where a sharded array is pooled over all its shards anyway.
      axis_index_groups: groups of indices along `axis_name`, of one size, that share statistics.
      dtype: of y; by default the promotion of x, scale and bias, as in Flax.
      activation: a function of the output, such as `jax.nn.relu`; a hashable one, and the same object every time.
      residual: of the shape of x, added before the activation: act(y + residual). The value, dtype and derivative are
        those of the separate operations; the derivative keeps x and the residual, and neither y nor the sum.

    Returns:
      y, of the shape of x, and `Moments(mean, var, count)`, each `[C]` and float32 at least; both differentiable in x,
      scale and bias, to any order and in both modes.

    Raises:
      ValueError: a shape, axis, group or epsilon that does not fit, or an `axis_name` that is not bound.
      TypeError: a complex mask, complex vectors for a real x, or a dtype that cannot hold the output.

    Warns:
      OneRowWarning: all devices together hold one row, so that y is the bias whatever x is.

    Examples:
      >>> import jax.numpy as jnp, bnjax
      >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
      >>> y, moments = bnjax.batch_norm(x, scale=jnp.ones(2), bias=jnp.array([0.0, 5.0]))
      >>> print(jnp.round(y, 2) + 0.0)
      [[-1.  4.]
       [ 1.  6.]]
      >>> print(moments.mean, moments.var)
      [ 2. 20.] [  1. 100.]

    References:
      Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167, algorithm 1.

    Differences: Flax pools per-device masked means unweighted and loses the variance at \|mean\|/std above 1e3.
    """
    x = _axes.as_input(x)
    layout = _axes.layout_of(x, axis)
    group = _collectives.group_of(axis_name, axis_index_groups, x.shape)
    mask = _axes.as_mask(mask, x)
    scale, bias, pivot = (
        _axes.as_optional(name, v, layout, x) for name, v in (("scale", scale), ("bias", bias), ("pivot", pivot))
    )
    epsilon = _axes.check_epsilon(epsilon, _axes.statistics_dtype(x))
    activation, residual = as_activation(activation), as_residual(residual, x)
    dtype = _axes.output_dtype(dtype, x, scale, bias)
    reduction = Reduction(layout, group, _FLOOR * epsilon)
    warn_of_one_row(x.shape, layout, group)
    return _batch_norm(reduction, epsilon, dtype, activation, x, scale, bias, mask, pivot, residual)


@partial(jax.jit, static_argnums=(0, 1, 2, 3), inline=True)
def _batch_norm(
    reduction: Reduction,
    epsilon: float,
    dtype: np.dtype,
    activation: Activation,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    mask: jax.Array | None,
    pivot: jax.Array | None,
    residual: jax.Array | None,
) -> tuple[jax.Array, Moments]:
    standardise = _standardised if jnp.iscomplexobj(x) else _standardise  # of complex x by autodiff of its moments
    y, s = standardise(reduction, epsilon, dtype, x, scale, bias, mask, start_pivot(x, pivot, reduction.layout))
    if activation is None:  # a sum keeps nothing for its derivative
        return finish(y, residual, None), s.moments()

    @_kernels.recompute
    def finished(y: jax.Array, x: jax.Array, vectors: Any, residual: jax.Array | None) -> jax.Array:
        return finish(in_place_of(y, _affine(reduction, dtype, x, mask, *vectors)), residual, activation)

    vectors = s, _coefficients(epsilon, x, mask, s, scale, bias)
    return finished(y, x, vectors, residual), s.moments()


def _standardised(
    reduction: Reduction,
    epsilon: float,
    dtype: np.dtype,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    mask: jax.Array | None,
    K: jax.Array,
) -> tuple[jax.Array, Centred]:
    """y = (x − K)·a + c with a = scale·rstd and c = bias − e·a, in the dtype of the statistics and rounded once."""
    s = moments_of(reduction, x, mask, K)
    return _affine(reduction, dtype, x, mask, s, _coefficients(epsilon, x, mask, s, scale, bias)), s


_standardise = jax.custom_jvp(_standardised, nondiff_argnums=(0, 1, 2))


def _affine(
    reduction: Reduction,
    dtype: np.dtype,
    x: jax.Array,
    mask: jax.Array | None,
    s: Centred,
    vectors: tuple[jax.Array, ...],
) -> jax.Array:
    """y from the coefficients of the next function."""
    a, c, *mean = map(reduction.layout.expand, vectors)
    return _kernels.affine(_kernels.readable(x, mask, *mean), reduction.layout.expand(s.pivot), a, c).astype(dtype)


def _coefficients(
    epsilon: float, x: jax.Array, mask: jax.Array | None, s: Centred, scale: jax.Array | None, bias: jax.Array | None
) -> tuple[jax.Array, ...]:
    """a and c of y = (x − K)·a + c; with a mask the mean too. All that meets x goes there together."""
    a = s.rstd(epsilon) if scale is None else s.rstd(epsilon) * scale
    c = -s.rest * a if bias is None else bias - s.rest * a
    return _collectives.vary_together((a, c) if mask is None else (a, c, s.mean), x)


@_standardise.defjvp
def _standardise_jvp(
    reduction: Reduction, epsilon: float, dtype: np.dtype, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[tuple[jax.Array, Centred], tuple[jax.Array, Centred]]:
    """t_y = t_x·a + (x − K)·t_a + t_c: two products per position, all the rest gathered per channel in t_c.

    The grouping is the speed. Transposed, it is one sum over dy and one over dy·(x − K), which travel together; spread
    over the positions, as (t_x − t_mean)·a + (x − mean)·t_a + t_bias, the same derivative takes half as many passes
    over memory again.
    """
    x, scale, bias, mask, K = primals
    t_x, t_scale, t_bias = tangents[:3]
    expand = reduction.layout.expand
    s = centred_moments(reduction, x, mask, K)
    t_x = _kernels.widened(t_x, K.dtype)
    t_s = moments_tangent(reduction, x, mask, s, t_x)
    vectors = jax.jvp(partial(_coefficients, epsilon, x, mask), (s, scale, bias), (t_s, t_scale, t_bias))
    (a, c, *mean), tangents = (tuple(map(expand, v)) for v in vectors)
    K = expand(s.pivot)
    y = _kernels.affine(_kernels.readable(x, mask, *mean), K, a, c).astype(dtype)
    return (y, s), (_kernels.tangent_affine(dtype, x, mask, (K, a, *mean), t_x, tangents), t_s)
