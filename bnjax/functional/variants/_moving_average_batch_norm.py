"""Implements moving average batch normalization (MABN): statistics of recent batches, forward and backward."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bnjax.functional import _axes, _collectives
from bnjax.functional._measure import Reduction
from bnjax.functional._moments import Moments
from bnjax.functional.variants._second_moment import Operands, Scaling, estimated


class RecentStats(NamedTuple):
    r"""Statistics of the last m batches, the newest last, and the number of batches so far; float32 at least.

    .. math:: \mathrm{squares}_i = \mathrm{E}[x_i^2], \qquad \mathrm{projections}_i = \mathrm{E}[d\hat x_i\, \hat x_i]

    Attributes:
      squares: `[m, C]`, the quadratic means of x.
      projections: `[m, C]`, the values of Λ in :func:`bnjax.moving_average_batch_norm`.
      steps: `[C]`, the number of batches so far.

    Examples:
      >>> import bnjax
      >>> recent = bnjax.RecentStats.start((3,), buffer_size=16)
      >>> recent.squares.shape, recent.steps.shape
      ((16, 3), (3,))

    References:
      Yan et al. 2020, https://arxiv.org/abs/2001.06838, section 4.
    """

    squares: jax.Array  # [m, C], E[x²]
    projections: jax.Array  # [m, C], Λ = E[dxhat·xhat]
    steps: jax.Array  # [C]

    @classmethod
    def start(cls, shape: tuple[int, ...], buffer_size: int) -> "RecentStats":
        """Returns the statistics as they are before the first batch.

        Args:
          shape: the feature shape, such as `(C,)`.
          buffer_size: m, the number of batches to average over.

        Returns:
          `RecentStats` of zeros.
        """
        empty = jnp.zeros((buffer_size, *shape), jnp.float32)
        return cls(empty, empty, jnp.zeros(shape, jnp.float32))


def moving_average_batch_norm(
    x: jax.Array,
    var: jax.Array,
    recent: RecentStats | None = None,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    warmup: int = 100,
    r_max: float = 5.0,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-5,
    mask: jax.Array | None = None,
    axis_name: _collectives.AxisName = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> tuple[jax.Array, Moments]:
    r"""Normalises x by the quadratic mean of the last m batches, for training with one or two examples per batch.

    .. math::
        \hat x = \frac{x}{\chi}, \quad y = r \hat x \cdot \mathrm{scale} + \mathrm{bias}, \qquad
        \chi^2 = \tfrac1m \sum_{\text{last } m} \mathrm{E}[x^2] + \epsilon, \quad
        r = \mathrm{clip}\Bigl(\frac{\chi}{\sqrt{\mathrm{var} + \epsilon}}, \frac1{r_{max}}, r_{max}\Bigr)

    The factor r makes the output what the exponential average `var` would give, which evaluation uses. r and χ are
    constants in the derivative, and the statistic Λ of the gradient is averaged over the same batches:

    .. math::
        dx = \frac1\chi \Bigl(d\hat x - \hat x \cdot \tfrac1m \sum_{\text{last } m} \Lambda\Bigr), \qquad
        \Lambda = \mathrm{E}[d\hat x\, \hat x]

    Λ is known only in the backward pass, so the gradient with respect to `recent` is the new value of `recent`.
    Differentiate with respect to it, do not pass it to the optimizer, and replace it by its gradient. Call the layer
    only once per gradient, because the gradients of two calls would be added. For the first `warmup` steps, and without
    `recent`, the batch is normalised by its own quadratic mean with r = 1, and the derivative is exact. Without
    `recent` the function is differentiable in both modes and to any order; with it, once and in reverse mode only.

    Args:
      x: `[..., C]`, any real dtype. The layer before should have weights of mean zero per output channel:
        :func:`bnjax.tools.centre_kernels`.
      var: `[C]`, the running quadratic mean before this batch.
      recent: `RecentStats(squares, projections, steps)`, `[m, C]`, `[m, C]` and `[C]`; or None.
      scale: `[C]`, or None for 1.
      bias: `[C]`, or None for 0.
      warmup: the number of first steps that are normalised by the batch's own statistics.
      r_max: limit of r and 1/r, at least 1.
      axis: the feature axis or axes; all others are reduced over.
      epsilon: added to the quadratic mean; positive.
      mask: non-negative weights (bool, integer or float), broadcastable to x; see :func:`bnjax.batch_norm`.
      axis_name: name, or names, of the mapped axes (`shard_map`, `pmap`, `vmap`) that share statistics.
      axis_index_groups: groups of indices along `axis_name`, of one size, that share statistics.
      dtype: of y; by default the promotion of x, scale and bias.

    Returns:
      y, of the shape of x, and the `Moments` of the batch about zero, each `[C]`: mean is 0 and var the quadratic mean.
      Pass them to :func:`bnjax.update_running` with momentum 0.98 and `debias` for the next `var`.

    Raises:
      ValueError: r_max is below 1 or `recent` has another shape; also as :func:`bnjax.batch_norm`.
      TypeError: as :func:`bnjax.batch_norm`.

    Examples:
      >>> import jax, jax.numpy as jnp, bnjax
      >>> recent = bnjax.RecentStats(jnp.array([[0.0], [14.0]]), jnp.array([[0.0], [0.2]]), jnp.array([1.0]))
      >>> x, var = jnp.array([[1.0], [-1.0], [2.0]]), jnp.array([8.0])
      >>> def loss(x, recent):
      ...     y, _ = bnjax.moving_average_batch_norm(x, var, recent, warmup=0)
      ...     return y[0, 0], y
      >>> (dx, recent), y = jax.grad(loss, (0, 1), has_aux=True)(x, recent)
      >>> print(jnp.round(y, 3).ravel(), recent.squares.ravel(), recent.steps)
      [ 0.354 -0.354  0.707] [14.  2.] [2.]

    References:
      Yan, Wan, Zhang, Zhang, Wei & Sun 2020, https://arxiv.org/abs/2001.06838, section 4; `warmup` and `r_max` as in
      the authors' program.

    Differences from the authors' program (https://github.com/megvii-model/MABN, `MABN.py`): before there are m batches,
    the average is over those so far; theirs is the newest batch alone. A warm-up of 100 is 100 steps here and 99 there,
    because their first step counts as 1 and the comparison is strict. r is 1 for `warmup` steps, theirs for 1000,
    because `var` starts without a bias here. `var` averages the quadratic means of the batches; theirs averages the
    averages over m batches. The program's buffer is given as two batch sizes, m = `real_B // B`. Its convolutions
    subtract from each kernel its mean, per output channel, before they use it (`CenConv2d`);
    :func:`bnjax.tools.centre_kernels` does that here.
    """
    x = _axes.as_real_input(x)
    layout = _axes.layout_of(x, axis)
    r_max = _axes.as_number("r_max", r_max, 1, advice="It limits r and 1/r.")
    if recent is not None:
        _check_recent(recent, layout)
    group = _collectives.group_of(axis_name, axis_index_groups, x.shape)
    scale, bias = _axes.as_optional("scale", scale, layout), _axes.as_optional("bias", bias, layout)
    static = (
        Reduction(layout, group),
        _axes.check_epsilon(epsilon, _axes.statistics_dtype(x)),
        _axes.output_dtype(dtype, x, scale, bias),
        _RecentProjections(_axes.as_integer("warmup", warmup, 0)),
        r_max,
    )
    arrays = (x, _axes.as_weights(_axes.as_mask(mask, x), x), scale, bias)
    return _moving_average(static, arrays, _axes.as_variance(var, layout), recent)


def _check_recent(recent: RecentStats, layout: _axes.Layout) -> None:
    """Raises ValueError unless the arrays of `recent` have the shapes [m, C], [m, C] and [C], with m at least 1."""
    shapes = [jnp.shape(a) for a in recent]
    m = shapes[0][:1]
    if not m or m == (0,) or shapes != [(*m, *layout.shape), (*m, *layout.shape), layout.shape]:
        raise ValueError(
            f"recent must hold squares and projections of shape (m, *{layout.shape}) and steps of shape "
            f"{layout.shape}; got {shapes}. RecentStats.start(shape, buffer_size) makes one."
        )


class _RecentProjections(NamedTuple):
    """Updates the statistics of recent batches in the backward pass; see `Rule` in `_second_moment.py`.

    The newest statistics replace the oldest. The backward pass uses the average of Λ over recent batches, and during
    warm-up the Λ of the batch itself.
    """

    warmup: int

    def __call__(self, state: RecentStats, projection: jax.Array, scaling: Scaling) -> tuple[jax.Array, RecentStats]:
        projections = push(state.projections, projection)
        new = RecentStats(push(state.squares, scaling.square), projections, state.steps + 1)
        return jnp.where(state.steps < self.warmup, projection, average(projections, new.steps)), new


def push(buffer: jax.Array, newest: jax.Array) -> jax.Array:
    """Returns the buffer [m, C] without its first row and with `newest` [C] as its last row."""
    return jnp.concatenate([buffer[1:], newest[None].astype(buffer.dtype)])


def average(buffer: jax.Array, steps: jax.Array) -> jax.Array:
    """Returns the mean over the rows of the buffer that are filled after this many steps; the other rows hold zeros."""
    return buffer.sum(0) / jnp.clip(steps, 1, len(buffer))


@partial(jax.jit, static_argnums=0)
def _moving_average(
    static: tuple[Reduction, float, jnp.dtype, _RecentProjections, float],
    arrays: tuple[jax.Array, jax.Array | None, jax.Array | None, jax.Array | None],
    var: jax.Array,
    recent: RecentStats | None,
) -> tuple[jax.Array, Moments]:
    """Computes y and the moments about zero, given checked arguments; traced once per shape."""
    reduction, epsilon, dtype, rule, r_max = static
    operands = Operands(reduction, epsilon, dtype, *arrays)
    moments = operands.moments
    if recent is None:
        rstd = lax.rsqrt(_numbers(moments.var) + epsilon)
        return operands.apply(rstd), lax.stop_gradient(moments)
    moments = lax.stop_gradient(moments)
    factor, rstd = _factors(rule, r_max, epsilon, moments, operands.vector("var", var), recent)

    def through(x: jax.Array, scaling: Scaling, state: RecentStats) -> jax.Array:
        return estimated(rule, reduction, x, operands.mask, scaling, state)

    scaling = Scaling(rstd, moments.var, moments.count)
    return operands.apply(factor, through, scaling, recent), moments


def _numbers(square: jax.Array) -> jax.Array:
    """Returns the mean square with NaN in place of an overflow, because x/χ would silently be 0 there."""
    return jnp.where(jnp.isfinite(square), square, jnp.nan)


def _factors(
    rule: _RecentProjections, r_max: float, epsilon: float, moments: Moments, var: jax.Array, recent: RecentStats
) -> tuple[jax.Array, jax.Array]:
    """Returns r/χ and 1/χ, each `[C]`; an empty batch, or one that is not finite, is left out of the average."""
    squares, _, steps = lax.stop_gradient(recent)
    good = (moments.count > 0) & jnp.isfinite(moments.var)
    with_this = average(push(squares, moments.var), steps + 1)
    square = jnp.where(good, with_this, average(squares, steps))
    early = steps < rule.warmup
    rstd = lax.rsqrt(jnp.where(early, _numbers(moments.var), square) + epsilon)
    r = jnp.clip(lax.rsqrt(var + epsilon) / rstd, 1 / r_max, r_max)
    return rstd * jnp.where(early, 1, r), rstd
