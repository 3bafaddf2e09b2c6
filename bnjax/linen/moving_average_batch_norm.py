"""Defines `MovingAverageBatchNorm` for flax.linen."""

from typing import Any

import flax.linen as nn
import jax

from bnjax.functional import Moments, RecentStats, RunningStats, moving_average_batch_norm
from bnjax.functional._protocol import AboutZero
from bnjax.functional._running import Momentum
from bnjax.linen._gradient_state import gradient_state
from bnjax.linen.batch_norm import BatchNorm


class MovingAverageBatchNorm(AboutZero, BatchNorm):
    r"""Batch normalization by the quadratic mean of the last m batches, for batches of one or two examples (MABN).

    .. math:: y = r \cdot \frac{x}{\chi} \cdot \mathrm{scale} + \mathrm{bias}

    forward and backward as in :func:`bnjax.moving_average_batch_norm`. The variables are those of
    :class:`bnjax.linen.BatchNorm`; `batch_stats/var` holds the running quadratic mean and `batch_stats/mean` zeros.
    The layer before should have weights of mean zero per output channel, as published:
    :func:`bnjax.tools.centre_kernels`.

    The statistics of the last m batches, `_overwrite_with_gradient/{squares, projections, steps}`, are updated by the
    backward pass: the gradient of each is its new value. `flax.training.train_state.TrainState` stores it if its params
    are `params` and this collection together. Without the collection each batch is normalised by its own statistics.

    Attributes:
      momentum: the weight of the OLD running quadratic mean.
      debias: leave the starting value out of the running quadratic mean.
      buffer_size: m; the statistics are like those of a batch of m times the size.
      warmup: the number of first steps that are normalised by the batch's own statistics.
      r_max: limit of r and 1/r.

    The other attributes are those of :class:`bnjax.linen.BatchNorm`.

    Raises:
      ValueError: see :func:`bnjax.moving_average_batch_norm`.

    Examples:
      >>> import jax, jax.numpy as jnp, bnjax
      >>> norm, x = bnjax.linen.MovingAverageBatchNorm(use_running_average=False), jnp.array([[3.0], [1.0]])
      >>> variables = norm.init(jax.random.key(0), x)
      >>> batch_stats = variables.pop("batch_stats")
      >>> def loss(variables):
      ...     y, updates = norm.apply({**variables, "batch_stats": batch_stats}, x, mutable=["batch_stats"])
      ...     return y[0, 0], updates["batch_stats"]
      >>> grads, batch_stats = jax.grad(loss, has_aux=True)(variables)
      >>> print(batch_stats["var"], grads["_overwrite_with_gradient"]["squares"][-2:].ravel())
      [5.] [0. 5.]

    References:
      Yan, Wan, Zhang, Zhang, Wei & Sun 2020, https://arxiv.org/abs/2001.06838.

    Differences from the authors' program: see :func:`bnjax.moving_average_batch_norm`.
    """

    momentum: Momentum = 0.98
    debias: bool = True
    buffer_size: int = 16
    warmup: int = 100
    r_max: float = 5.0

    @nn.nowrap
    def _recent(self, running: RunningStats) -> RecentStats | None:
        """Returns the statistics of recent batches, or None if their collection was not passed."""
        state = gradient_state(self, RecentStats.start(running.var.shape, self.buffer_size)._asdict())
        return None if state is None else RecentStats(**state)

    def normalize_batch(self, x: jax.Array, running: RunningStats, **options: Any) -> tuple[jax.Array, Moments]:
        options |= dict(warmup=self.warmup, r_max=self.r_max)
        return moving_average_batch_norm(x, running.var, self._recent(running), **options)

    def normalize_running(self, x: jax.Array, running: RunningStats, **options: Any) -> jax.Array:
        self._recent(running)  # creates the collection if `init` runs in evaluation mode
        return super().normalize_running(x, running, **options)

    averaged_moments = AboutZero.averaged_moments
    evaluation_affine = AboutZero.evaluation_affine
