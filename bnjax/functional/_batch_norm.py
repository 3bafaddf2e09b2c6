"""Normalises a batch by its own statistics, as batch normalization does in training.

The computation has three steps:

1. The batch is measured (`_measure.py`) without a derivative: K, e = mean − K, var, rstd = 1/√(var + ε).
2. With these constants x is standardised, z = (x − K)·rstd, and the plain formula of batch normalization is applied
   to z, where every number is about 1 in size, whatever the size of x. JAX differentiates this formula; the values of
   its mean and variance are replaced by the measured ones (`value_of`), which are more accurate.
3. One checkpoint keeps x and the measured vectors for the backward pass and recomputes the rest.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from bnjax.functional import _axes, _collectives
from bnjax.functional._derivative import value_of, widen
from bnjax.functional._measure import Measured, Reduction, measure, squared
from bnjax.functional._moments import Moments, formula_of, moments_of, scaled_rstd
from bnjax.functional._one_row import warn_of_one_row

# A variance below this part of epsilon does not change y, so the guard need not make it accurate. With this limit a
# constant channel makes the guard sum again only if it lies further than √(16·1e-3·ε) from zero: 4e-4 by default.
_FLOOR = 1e-3


def batch_norm(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-5,
    mask: jax.Array | None = None,
    axis_name: _collectives.AxisName = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> tuple[jax.Array, Moments]:
    r"""Normalises x by the mean and variance of its own batch, pooled over devices.

    .. math:: y = \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}} \cdot \mathrm{scale} + \mathrm{bias}

    with the moments of :func:`bnjax.batch_moments`. It takes one all-reduce forward and one backward. It is accurate
    from the first batch on: in float32 the variance is right to 1e-5 for \|mean\|/std up to 1e4 and more, values up to
    1e30 are standardised, and a constant channel gives `bias`. A batch in which the mean of some channel lies more than
    4 standard deviations from zero costs one more read of x and one more all-reduce.

    Args:
      x: `[..., C]`, any dtype. A complex x has a complex mean and the real variance E\|x − mean\|², as in Flax.
      scale: `[C]`, or None for 1.
      bias: `[C]`, or None for 0.
      axis: the feature axis or axes; all others are reduced over.
      epsilon: added to the variance; positive.
      mask: non-negative weights (bool, integer or float), broadcastable to x. Positions of weight zero do not
        count in the moments; they are normalised like the others, and NaN or Inf there is read as the mean.
      axis_name: name, or names, of the mapped axes (`shard_map`, `pmap`, `vmap`) that share statistics. None under
        plain `jit`, where a sharded array is pooled over all its shards anyway.
      axis_index_groups: groups of indices along `axis_name`, of one size, that share statistics.
      dtype: of y; by default the promotion of x, scale and bias, as in Flax.

    Returns:
      y, of the shape of x, and `Moments(mean, var, count)`, each `[C]` and float32 at least; both differentiable in x,
      scale and bias, to any order and in both modes.

    Raises:
      ValueError: a shape, axis, group or epsilon does not fit, or `axis_name` is not bound.
      TypeError: the mask is complex, scale or bias is complex and x is not, or `dtype` cannot hold the output.

    Warns:
      OneRowWarning: all devices together hold one row per channel, so that y is the bias whatever x is.

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
    weights = _axes.as_weights(_axes.as_mask(mask, x), x)
    scale, bias = _axes.as_optional("scale", scale, layout, x), _axes.as_optional("bias", bias, layout, x)
    epsilon = _axes.check_epsilon(epsilon, _axes.statistics_dtype(x))
    dtype = _axes.output_dtype(dtype, x, scale, bias)
    warn_of_one_row(x.shape, layout, group)
    return normalize_batch(Reduction(layout, group), epsilon, dtype, None, x, scale, bias, weights)


# The correction of batch renormalization: a function of the measured moments, 1/√(var + ε) and further arrays that
# returns r and d, by which the standardised x is multiplied and shifted.
Correction = Callable[..., tuple[jax.Array, jax.Array]]


@partial(jax.jit, static_argnums=(0, 1, 2, 3))  # traced and lowered once for each shape, however many layers have it
@partial(
    jax.checkpoint,
    prevent_cse=False,
    policy=jax.checkpoint_policies.save_only_these_names("measured"),
    static_argnums=(0, 1, 2, 3),
)
def normalize_batch(
    reduction: Reduction,
    epsilon: float,
    dtype: np.dtype,
    correction: Correction | None,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    weights: jax.Array | None,
    *others: Any,
) -> tuple[jax.Array, Moments]:
    """Normalises a batch, given checked arguments, and returns y and its moments.

    y = (xhat·r + d)·scale + bias, where r and d come from `correction`; without one, r = 1 and d = 0.

    Args:
      reduction: the axes and devices whose rows are pooled.
      epsilon: added to the variance.
      dtype: of y.
      correction: called with the measured moments, 1/√(var + ε) and `others`; returns r and d, which are taken as
        constants in the derivative.
      x: `[..., C]`.
      scale, bias: `[C]` or None.
      weights: as in `averages` (`_measure.py`).
      others: further arrays for the correction.
    """
    expand, wide_dtype = reduction.layout.expand, _axes.statistics_dtype(x, scale, bias)

    batch: Measured = jax.tree.map(_keep, measure(x, weights, reduction, _FLOOR * epsilon))
    rstd = _keep(scaled_rstd(batch, epsilon))
    wide = widen(x)
    z = (wide - expand(batch.K)) * expand(rstd)
    mean, var = formula_of(batch, rstd, z, weights, reduction)
    a = value_of(jnp.ones_like(var), lax.rsqrt(var + epsilon * squared(rstd)))  # var + ε·rstd² is 1 by measurement
    b = None if bias is None else _collectives.match(bias.astype(wide_dtype), mean)
    s = None if scale is None else _collectives.match(scale.astype(wide_dtype), mean)
    if correction is not None:
        r, d = lax.stop_gradient(correction(batch, rstd, *others))
        shift = d if s is None else d * s
        s, b = r if s is None else r * s, shift if b is None else shift + b
    a = a if s is None else a * s
    c = -mean * a if b is None else b - mean * a
    if weights is None:
        a, c = _collectives.vary_together((a, c), x)
        # The derivative in `a` sums dy·u. XLA:CPU computes that sum in one loop only if nothing else reads u. If u
        # were z, which dx reads too, it would be written to memory in the forward pass and kept. So u is x − K,
        # written in terms that XLA does not find equal to those of z, and the value of y comes from z. A block thus
        # keeps two activations and not three. The sum overflows, and the derivative is not finite, where Σ|dy·(x − K)|
        # exceeds 3e38 in float32; a factor against that would be a second vector in the loop, which XLA:CPU does not
        # fuse.
        u = wide + expand(-batch.K)
        y = value_of(z * expand(a) + expand(c), u * expand(a * rstd) + expand(c))
    else:  # NaN at weight 0 is read as the mean, so that it reaches neither y nor the derivative
        a, c, read = _collectives.vary_together((a, c, mean), x)
        known = jnp.where(_axes.takes_part(weights) | jnp.isfinite(x), z, expand(read))
        y = known * expand(a) + expand(c)
    return y.astype(dtype), moments_of(batch, rstd, mean, var)


def _keep(vector: Any) -> Any:
    """Names a vector so that the checkpoint keeps it; a complex one as two, because JAX names real arrays only."""
    if not isinstance(vector, jax.Array):
        return vector  # a count that is known before the program runs
    if jnp.iscomplexobj(vector):
        return lax.complex(_keep(vector.real), _keep(vector.imag))
    return checkpoint_name(vector, "measured")
