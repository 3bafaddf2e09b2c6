"""Defines `PowerNorm` for flax.nnx."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bnjax.functional import Moments, RunningStats, power_norm
from bnjax.functional._protocol import AboutZero
from bnjax.functional._running import Momentum
from bnjax.nnx._gradient_state import OverwriteWithGradient
from bnjax.nnx.batch_norm import BatchNorm


class PowerNorm(AboutZero, BatchNorm):
    r"""Power normalization, for Transformers: a running quadratic mean normalises in training and evaluation alike.

    .. math:: y = \frac{x}{\sqrt{\psi^2 + \epsilon}} \cdot \mathrm{scale} + \mathrm{bias}

    where ψ² is the running quadratic mean of earlier batches; see :func:`bnjax.power_norm`. The variables are those of
    :class:`bnjax.nnx.BatchNorm`; `var` holds ψ² and `mean` zeros.

    The running statistic of the gradient, `projection`, is updated by the backward pass: its gradient is its new value
    (:class:`bnjax.nnx.OverwriteWithGradient`). If it is never updated and stays zero, ψ is a constant in the
    derivative.

    Args:
      num_features: size of the feature axis, or sizes of several; see :class:`bnjax.nnx.BatchNorm`.
      momentum: the weight of the OLD running quadratic mean.
      gradient_momentum: the weight of the OLD running statistic of the gradient.
      fields: those of :class:`bnjax.nnx.BatchNorm`.

    Raises:
      ValueError: see :func:`bnjax.power_norm`.

    Examples:
      >>> import jax.numpy as jnp, bnjax
      >>> from flax import nnx
      >>> norm, x = bnjax.nnx.PowerNorm(1, rngs=nnx.Rngs(0)), jnp.array([[3.0], [1.0]])
      >>> trained = nnx.DiffState(0, nnx.Any(nnx.Param, bnjax.nnx.OverwriteWithGradient))
      >>> grads = nnx.grad(lambda norm: norm(x)[0, 0], argnums=trained)(norm)
      >>> nnx.update(norm, nnx.filter_state(grads, bnjax.nnx.OverwriteWithGradient))
      >>> print(f"{norm.var[0]:.3f} {norm.projection[0]:.3f}")
      1.400 0.150

    References:
      Shen, Yao, Gholami, Mahoney & Keutzer 2020, https://arxiv.org/abs/2003.07845, algorithm 2.

    Differences from the authors' program, which warms up and divides by groups of channels first: see
    :func:`bnjax.power_norm`.
    """

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        momentum: Momentum = 0.9,
        gradient_momentum: float = 0.9,
        **fields: Any,
    ):
        super().__init__(num_features, momentum=momentum, **fields)
        self.gradient_momentum = gradient_momentum
        self.projection = OverwriteWithGradient(jnp.zeros(self.var.shape, jnp.float32))

    def normalize_batch(self, x: jax.Array, running: RunningStats, **options: Any) -> tuple[jax.Array, Moments]:
        projection = self.projection[...].reshape(running.var.shape)
        return power_norm(x, running.var, projection, gradient_momentum=self.gradient_momentum, **options)

    averaged_moments = AboutZero.averaged_moments
