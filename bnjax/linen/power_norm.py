"""Defines `PowerNorm` for flax.linen."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bnjax.functional import Moments, RunningStats, power_norm
from bnjax.functional._protocol import AboutZero
from bnjax.functional._running import Momentum
from bnjax.linen._gradient_state import gradient_state
from bnjax.linen.batch_norm import BatchNorm


class PowerNorm(AboutZero, BatchNorm):
    r"""Power normalization, for Transformers: a running quadratic mean normalises in training and evaluation alike.

    .. math:: y = \frac{x}{\sqrt{\psi^2 + \epsilon}} \cdot \mathrm{scale} + \mathrm{bias}

    where ψ² is the running quadratic mean of earlier batches; see :func:`bnjax.power_norm`. The variables are those of
    :class:`bnjax.linen.BatchNorm`; `batch_stats/var` holds ψ² and `batch_stats/mean` zeros.

    The running statistic of the gradient, `_overwrite_with_gradient/projection`, is updated by the backward pass: its
    gradient is its new value. `flax.training.train_state.TrainState` stores it if its params are `params` and this
    collection together. Without the collection ψ is a constant in the derivative.

    Attributes:
      momentum: the weight of the OLD running quadratic mean.
      gradient_momentum: the weight of the OLD running statistic of the gradient.

    The other attributes are those of :class:`bnjax.linen.BatchNorm`.

    Raises:
      ValueError: see :func:`bnjax.power_norm`.

    Examples:
      >>> import jax, jax.numpy as jnp, bnjax
      >>> norm, x = bnjax.linen.PowerNorm(use_running_average=False), jnp.array([[3.0], [1.0]])
      >>> variables = norm.init(jax.random.key(0), x)
      >>> batch_stats = variables.pop("batch_stats")
      >>> def loss(variables):
      ...     y, updates = norm.apply({**variables, "batch_stats": batch_stats}, x, mutable=["batch_stats"])
      ...     return y[0, 0], updates["batch_stats"]
      >>> grads, batch_stats = jax.grad(loss, has_aux=True)(variables)
      >>> print(f"{batch_stats['var'][0]:.3f} {grads['_overwrite_with_gradient']['projection'][0]:.3f}")
      1.400 0.150

    References:
      Shen, Yao, Gholami, Mahoney & Keutzer 2020, https://arxiv.org/abs/2003.07845, algorithm 2.

    Differences from the authors' program, which warms up and divides by groups of channels first: see
    :func:`bnjax.power_norm`.
    """

    momentum: Momentum = 0.9
    gradient_momentum: float = 0.9

    @nn.nowrap
    def _projection(self, running: RunningStats) -> jax.Array | None:
        """Returns the running statistic of the gradient, or None if its collection was not passed."""
        state = gradient_state(self, {"projection": jnp.zeros(running.var.shape, jnp.float32)})
        return None if state is None else state["projection"]

    def normalize_batch(self, x: jax.Array, running: RunningStats, **options: Any) -> tuple[jax.Array, Moments]:
        options |= dict(gradient_momentum=self.gradient_momentum)
        return power_norm(x, running.var, self._projection(running), **options)

    def normalize_running(self, x: jax.Array, running: RunningStats, **options: Any) -> jax.Array:
        self._projection(running)  # creates the collection if `init` runs in evaluation mode
        return super().normalize_running(x, running, **options)

    averaged_moments = AboutZero.averaged_moments
    evaluation_affine = AboutZero.evaluation_affine
