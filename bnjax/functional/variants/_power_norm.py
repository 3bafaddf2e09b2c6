"""Implements power normalization: a running quadratic mean forward, a running statistic of the gradient backward."""

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


def power_norm(
    x: jax.Array,
    var: jax.Array,
    projection: jax.Array | None = None,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    gradient_momentum: float = 0.9,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-5,
    mask: jax.Array | None = None,
    axis_name: _collectives.AxisName = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> tuple[jax.Array, Moments]:
    r"""Normalises x by the running quadratic mean of earlier batches, in training as in evaluation, without a mean.

    .. math::
        \hat x = \frac{x}{\sqrt{\psi^2 + \epsilon}}, \qquad y = \hat x \cdot \mathrm{scale} + \mathrm{bias}

    with :math:`\psi^2` = `var`. In the derivative, the statistic of the gradient is replaced by an average of it over
    steps, `projection` :math:`= \nu`:

    .. math::
        dx = \frac{d\hat x - \nu \hat x}{\sqrt{\psi^2 + \epsilon}}, \qquad
        \nu' = \nu \cdot (1 - (1 - \alpha)\Gamma) + (1 - \alpha)\Lambda, \qquad
        \Gamma = \tfrac1W \sum w\hat x^2, \quad \Lambda = \tfrac1W \sum d\hat x\, \hat x

    :math:`\nu'` is known only in the backward pass, so the gradient with respect to `projection` is the new value of
    `projection`. Differentiate with respect to it, do not pass it to the optimizer, and replace it by its gradient.
    Call the layer only once per gradient, because the gradients of two calls would be added. Without `projection` ψ is
    a constant in the derivative, and the function is differentiable in both modes and to any order. With it, the
    function is differentiable once, in reverse mode; while it is zero, dx is the same as without it.

    Args:
      x: `[..., C]`, any real dtype.
      var: `[C]`, the running quadratic mean before this batch; starts at 1.
      projection: `[C]`, the running ν, which starts at 0; or None.
      scale: `[C]`, or None for 1.
      bias: `[C]`, or None for 0.
      gradient_momentum: α, the weight of the old ν, in [0, 1].
      axis: the feature axis or axes; all others are reduced over.
      epsilon: added to the quadratic mean; positive.
      mask: non-negative weights (bool, integer or float), broadcastable to x; see :func:`bnjax.batch_norm`.
      axis_name: name, or names, of the mapped axes (`shard_map`, `pmap`, `vmap`) that share statistics.
      axis_index_groups: groups of indices along `axis_name`, of one size, that share statistics.
      dtype: of y; by default the promotion of x, scale and bias.

    Returns:
      y, of the shape of x, and the `Moments` of the batch about zero, each `[C]`: mean is 0 and var the quadratic mean.
      Pass them to :func:`bnjax.update_running` with momentum 0.9 for the next `var`.

    Raises:
      ValueError: gradient_momentum is outside [0, 1]; also as :func:`bnjax.batch_norm`.
      TypeError: as :func:`bnjax.batch_norm`.

    Examples:
      >>> import jax, jax.numpy as jnp, bnjax
      >>> x, var, projection = jnp.array([[2.0], [4.0]]), jnp.array([4.0]), jnp.array([0.5])
      >>> y, moments = bnjax.power_norm(x, var, projection)
      >>> print(jnp.round(y, 3).ravel(), moments.var)
      [1. 2.] [10.]
      >>> loss = lambda x, projection: bnjax.power_norm(x, var, projection)[0].sum()
      >>> dx, projection = jax.grad(loss, (0, 1))(x, projection)
      >>> print(jnp.round(dx, 3).ravel(), f"{projection[0]:.3f}")
      [0.25 0.  ] 0.525

    References:
      Shen, Yao, Gholami, Mahoney & Keutzer 2020, https://arxiv.org/abs/2003.07845, algorithm 2.

    Differences: the authors' program (https://github.com/sIncerass/powernorm, `mask_powernorm.py`) first divides each
    position by its quadratic mean over the channels, or over each of `group_num` groups of them; normalises by the
    batch's own ψ for `warmup_iters` steps, 10,000 by default, in which the running one is averaged twice; and divides
    dx by the batch's ψ throughout. Its statistic of the gradient counts masked positions. Algorithm 2 and this function
    do none of this, so train with a warm-up of the learning rate.
    """
    x = _axes.as_real_input(x)
    layout = _axes.layout_of(x, axis)
    gradient_momentum = _axes.as_number("gradient_momentum", gradient_momentum, 0, 1)
    group = _collectives.group_of(axis_name, axis_index_groups, x.shape)
    scale, bias = _axes.as_optional("scale", scale, layout), _axes.as_optional("bias", bias, layout)
    static = (
        Reduction(layout, group),
        _axes.check_epsilon(epsilon, _axes.statistics_dtype(x)),
        _axes.output_dtype(dtype, x, scale, bias),
        _RunningProjection(gradient_momentum),
    )
    arrays = (x, _axes.as_weights(_axes.as_mask(mask, x), x), scale, bias)
    projection = _axes.as_optional("projection", projection, layout)
    return _power_norm(static, arrays, _axes.as_variance(var, layout), projection)


class _RunningProjection(NamedTuple):
    """Updates ν in the backward pass: ν' = ν(1 − (1 − α)Γ) + (1 − α)Λ with Γ = rstd²·E[x²]; dx uses the old ν."""

    momentum: float

    def __call__(self, state: jax.Array, projection: jax.Array, scaling: Scaling) -> tuple[jax.Array, jax.Array]:
        new = 1 - self.momentum
        gamma = scaling.rstd**2 * scaling.square
        return state, state * (1 - new * gamma) + new * projection


@partial(jax.jit, static_argnums=0)
def _power_norm(
    static: tuple[Reduction, float, jnp.dtype, _RunningProjection],
    arrays: tuple[jax.Array, jax.Array | None, jax.Array | None, jax.Array | None],
    var: jax.Array,
    projection: jax.Array | None,
) -> tuple[jax.Array, Moments]:
    """Computes y and the moments about zero, given checked arguments; traced once per shape."""
    reduction, epsilon, dtype, rule = static
    operands = Operands(reduction, epsilon, dtype, *arrays)
    moments = lax.stop_gradient(operands.moments)
    rstd = lax.rsqrt(operands.vector("var", var) + epsilon)
    if projection is None:
        return operands.apply(rstd), moments

    def through(x: jax.Array, scaling: Scaling, state: jax.Array) -> jax.Array:
        return estimated(rule, reduction, x, operands.mask, scaling, state)

    scaling = Scaling(rstd, moments.var, moments.count)
    return operands.apply(rstd, through, scaling, projection), moments
