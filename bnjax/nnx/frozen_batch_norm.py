"""Defines `FrozenBatchNorm` for flax.nnx."""

from bnjax.functional.variants._frozen_batch_norm import Frozen
from bnjax.nnx.batch_norm import BatchNorm


class FrozenBatchNorm(Frozen, BatchNorm):
    r"""Batch normalization with constant statistics, scale and bias, for detection and fine-tuning on few images.

    .. math:: y = \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}} \cdot \mathrm{scale} + \mathrm{bias}

    with the running averages, which no call changes, and with scale and bias, whose gradients are zero; see
    :func:`bnjax.frozen_batch_norm`. The variables are those of :class:`bnjax.nnx.BatchNorm`, whose checkpoints load. An
    optimizer that decays weights changes them without a gradient: leave them out of it
    (:func:`bnjax.tools.decay_mask`).

    The arguments are those of :class:`bnjax.nnx.BatchNorm`; those that concern training, and
    `.train()`, have no effect.

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
