"""Defines `MovingAverageBatchNorm` for flax.nnx."""

from collections.abc import Sequence
from typing import Any

import jax

from bnjax.functional import Moments, RecentStats, RunningStats, moving_average_batch_norm
from bnjax.functional._protocol import AboutZero
from bnjax.functional._running import Momentum
from bnjax.nnx._gradient_state import OverwriteWithGradient
from bnjax.nnx.batch_norm import BatchNorm


class MovingAverageBatchNorm(AboutZero, BatchNorm):
    r"""Batch normalization by the quadratic mean of the last m batches, for batches of one or two examples (MABN).

    .. math:: y = r \cdot \frac{x}{\chi} \cdot \mathrm{scale} + \mathrm{bias}

    forward and backward as in :func:`bnjax.moving_average_batch_norm`. The variables are those of
    :class:`bnjax.nnx.BatchNorm`; `var` holds the running quadratic mean and `mean` zeros. The layer before should have
    weights of mean zero per output channel, as published: :func:`bnjax.tools.centre_kernels`.

    The statistics of the last m batches, `recent_squares`, `recent_projections` and `recent_steps`, are updated by the
    backward pass: the gradient of each is its new value (:class:`bnjax.nnx.OverwriteWithGradient`). If they are never
    updated, each batch is normalised by its own statistics.

    Args:
      num_features: size of the feature axis, or sizes of several; see :class:`bnjax.nnx.BatchNorm`.
      momentum: the weight of the OLD running quadratic mean.
      debias: leave the starting value out of the running quadratic mean.
      buffer_size: m; the statistics are like those of a batch of m times the size.
      warmup: the number of first steps that are normalised by the batch's own statistics.
      r_max: limit of r and 1/r.
      fields: those of :class:`bnjax.nnx.BatchNorm`.

    Raises:
      ValueError: see :func:`bnjax.moving_average_batch_norm`.

    Examples:
      >>> import jax.numpy as jnp, bnjax
      >>> from flax import nnx
      >>> norm, x = bnjax.nnx.MovingAverageBatchNorm(1, rngs=nnx.Rngs(0)), jnp.array([[3.0], [1.0]])
      >>> trained = nnx.DiffState(0, nnx.Any(nnx.Param, bnjax.nnx.OverwriteWithGradient))
      >>> grads = nnx.grad(lambda norm: norm(x)[0, 0], argnums=trained)(norm)
      >>> nnx.update(norm, nnx.filter_state(grads, bnjax.nnx.OverwriteWithGradient))
      >>> print(norm.var[...], norm.recent_squares[-2:].ravel())
      [5.] [0. 5.]

    References:
      Yan, Wan, Zhang, Zhang, Wei & Sun 2020, https://arxiv.org/abs/2001.06838.

    Differences from the authors' program: see :func:`bnjax.moving_average_batch_norm`.
    """

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        momentum: Momentum = 0.98,
        debias: bool = True,
        buffer_size: int = 16,
        warmup: int = 100,
        r_max: float = 5.0,
        **fields: Any,
    ):
        super().__init__(num_features, momentum=momentum, debias=debias, **fields)
        self.buffer_size, self.warmup, self.r_max = buffer_size, warmup, r_max
        for name, value in RecentStats.start(self.var.shape, buffer_size)._asdict().items():
            setattr(self, f"recent_{name}", OverwriteWithGradient(value))

    def normalize_batch(self, x: jax.Array, running: RunningStats, **options: Any) -> tuple[jax.Array, Moments]:
        kept = {name: getattr(self, f"recent_{name}")[...] for name in RecentStats._fields}
        lead = {name: v.shape[: v.ndim - self.var.ndim] for name, v in kept.items()}
        recent = RecentStats(**{name: v.reshape(*lead[name], *running.var.shape) for name, v in kept.items()})
        return moving_average_batch_norm(x, running.var, recent, warmup=self.warmup, r_max=self.r_max, **options)

    averaged_moments = AboutZero.averaged_moments
