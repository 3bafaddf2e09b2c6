"""`FrozenBatchNorm` for flax.nnx."""

from typing import Any

import jax

from bnjax.functional import RunningStats, frozen_batch_norm
from bnjax.nnx.batch_norm import BatchNorm


class FrozenBatchNorm(BatchNorm):
    r"""Batch normalization as a constant: for detection and fine-tuning on few images.

    .. math:: y = \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}} \cdot \mathrm{scale} + \mathrm{bias}

    with the running averages, which no call changes, and with scale and bias, which have no gradient:
    :func:`bnjax.frozen_batch_norm`. The variables are those of :class:`bnjax.nnx.BatchNorm`, whose checkpoints load. An
    optimizer that decays weights changes them without a gradient: leave them out of it
    (:func:`bnjax.tools.decay_mask`).

    The arguments are those of :class:`bnjax.nnx.BatchNorm`; what concerns training has no effect, nor has `.train()`.

    Raises:
      ValueError: as :func:`bnjax.normalize`.

    Examples:
      >>> import jax.numpy as jnp, bnjax
      >>> from flax import nnx
      >>> norm, x = bnjax.nnx.FrozenBatchNorm(1, epsilon=3.0, rngs=nnx.Rngs(0)), jnp.array([[2.0], [6.0]])
      >>> print(norm(x).ravel())
      [1. 3.]
      >>> grads = nnx.grad(lambda norm: norm(x).sum())(norm)
      >>> print(grads["scale"][...], grads["bias"][...])
      [0.] [0.]

    References:
      He, Zhang, Ren & Sun 2016, https://arxiv.org/abs/1512.03385, appendix A.
    """

    def __call__(  # type: ignore[override]
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        update_stats: bool | None = None,
        residual: jax.Array | None = None,
    ) -> jax.Array:
        """Normalises x.

        Args:
          x: `[..., C]`.
          use_running_average, update_stats: what a model says to a `BatchNorm`; without effect.
          mask: as in :func:`bnjax.frozen_batch_norm`.
          residual: of the shape of x, added before the activation.

        Returns:
          y, of the shape of x.
        """
        return self._forward(x, True, mask=mask, update_stats=False, scale=None, bias=None, residual=residual)

    def _normalize(self, x: jax.Array, running: RunningStats, **options: Any) -> jax.Array:
        return frozen_batch_norm(x, running.mean, running.var, **options)
