"""Computes one call of a layer as a function: all that a module of any framework does besides storing variables."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bnjax.functional import _axes
from bnjax.functional._affine import affine_of
from bnjax.functional._collectives import AxisName
from bnjax.functional._merge import moments_for_running
from bnjax.functional._moments import Moments
from bnjax.functional._protocol import Normalization
from bnjax.functional._running import Momentum, RunningStats, update_running

_BATCH_NORM = Normalization()


class Step(NamedTuple):
    r"""Result of one call of a layer: the output, the moments of the batch and the new running averages.

    Attributes:
      y: of the shape of x.
      moments: `Moments` of the batch, each `[C]`, differentiable; None in evaluation.
      running: `RunningStats` after the call.

    Examples:
      >>> import jax.numpy as jnp, bnjax
      >>> running = bnjax.RunningStats(jnp.zeros(1), jnp.ones(1))
      >>> step = bnjax.batch_norm_step(jnp.array([[1.0], [3.0]]), running, momentum=0.5)
      >>> print(step.moments.mean, step.running.mean)
      [2.] [1.]
    """

    y: jax.Array
    moments: Moments | None
    running: RunningStats


def batch_norm_step(
    x: jax.Array,
    running: RunningStats,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    use_running_average: bool = False,
    update_stats: jax.Array | bool = True,
    variant: Normalization = _BATCH_NORM,
    axis: int | Sequence[int] = -1,
    momentum: Momentum = 0.99,
    epsilon: float = 1e-5,
    mask: jax.Array | None = None,
    axis_name: AxisName = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    stats_axis_name: AxisName = None,
    dtype: jax.typing.DTypeLike | None = None,
    scale_offset: float = 0.0,
    debias: bool = False,
    unbiased_var: bool = False,
) -> Step:
    r"""Runs a whole batch normalization layer once: normalises x and takes a step of the running averages.

    .. math::
        y = \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}} \cdot \mathrm{scale} + \mathrm{bias}, \qquad
        \mathrm{running} \leftarrow m \cdot \mathrm{running} + (1 - m)\,(\mathrm{mean}, \mathrm{var})

    where mean and var are those of the batch, or with `use_running_average` those of `running`, which then stays as it
    is. The modules of `bnjax.linen` and `bnjax.nnx` store variables and call this function; a layer in Equinox, Haiku
    or plain JAX can do so too.

    Args:
      x: `[..., C]`, any dtype.
      running: `RunningStats(mean, var)`, each `[C]`; they start at 0 and 1.
      scale: `[C]`, or of the rank of x and broadcastable to it, such as `[N, 1, 1, C]` for one per example; or None
        for 1.
      bias: of the same shapes as scale, or None for 0.
      use_running_average: normalise by the running averages (evaluation) instead of by the batch (training).
      update_stats: whether a call that normalises by the batch updates the running averages; may be traced.
      variant: how the layer normalises, by default batch normalization; see :class:`bnjax.Normalization`.
      axis: the feature axis or axes; all others are reduced over.
      momentum, debias, unbiased_var: as in :func:`bnjax.update_running`.
      epsilon: added to the variance; positive.
      mask: non-negative weights, broadcastable to x; see :func:`bnjax.batch_norm`.
      axis_name: name, or names, of the mapped axes that share statistics.
      axis_index_groups: groups of indices along `axis_name`, of one size, that share statistics.
      stats_axis_name: name, or names, of the mapped axes whose devices the running averages follow, where fewer devices
        share the statistics that normalise; None for the devices that share them.
      dtype: of y; by default the promotion of x, scale and bias.
      scale_offset: added to scale, in float32 at least: with 1 the layer multiplies by 1 + scale.

    Returns:
      `Step(y, moments, running)`.

    Raises:
      ValueError, TypeError: as :func:`bnjax.batch_norm`, :func:`bnjax.normalize` and :func:`bnjax.update_running`; or
        a flag is not a bool.

    Examples:
      >>> import jax.numpy as jnp, bnjax
      >>> x, running = jnp.array([[1.0, 10.0], [3.0, 30.0]]), bnjax.RunningStats(jnp.zeros(2), jnp.ones(2))
      >>> y, moments, running = bnjax.batch_norm_step(x, running, momentum=0.9)
      >>> print(jnp.round(y[0], 2), running.mean)
      [-1. -1.] [0.2 2. ]
      >>> y = bnjax.batch_norm_step(x, running, use_running_average=True).y

    References:
      Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167, algorithms 1 and 2.
    """
    use_running_average = _axes.as_flag("use_running_average", use_running_average)
    affine = affine_of(x, scale, bias, axis=axis, offset=scale_offset, dtype=dtype)
    options: dict[str, Any] = dict(axis=axis, epsilon=epsilon, mask=mask, **affine.core)
    if use_running_average:
        return Step(affine.finish(variant.normalize_running(x, running, **options)), None, running)
    groups: dict[str, Any] = dict(axis_name=axis_name, axis_index_groups=axis_index_groups)
    y, moments = variant.normalize_batch(x, running, **options, **groups)
    if isinstance(update_stats, jax.Array) or _axes.as_flag("update_stats", update_stats):
        followed = moments_for_running(moments, running.mean, shape=x.shape, stats_axis_name=stats_axis_name, **groups)
        new = update_running(running, followed, momentum=momentum, debias=debias, unbiased_var=unbiased_var)
        if isinstance(update_stats, jax.Array):
            new = jax.tree.map(lambda a, b: jnp.where(update_stats, a, b.astype(a.dtype)), new, running)
        running = new
    return Step(affine.finish(y), moments, running)
