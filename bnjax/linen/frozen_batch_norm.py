"""Defines `FrozenBatchNorm` for flax.linen."""

from bnjax.functional.variants._frozen_batch_norm import Frozen
from bnjax.linen.batch_norm import BatchNorm


class FrozenBatchNorm(Frozen, BatchNorm):
    r"""Batch normalization with constant statistics, scale and bias, for detection and fine-tuning on few images.

    .. math:: y = \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}} \cdot \mathrm{scale} + \mathrm{bias}

    with the running averages, which no call changes, and with scale and bias, whose gradients are zero; see
    :func:`bnjax.frozen_batch_norm`. The variables are those of :class:`bnjax.linen.BatchNorm`, whose checkpoints load.
    An optimizer that decays weights changes them without a gradient: leave them out of it
    (:func:`bnjax.tools.decay_mask`).

    The attributes and the arguments of the call are those of :class:`bnjax.linen.BatchNorm`; those that concern
    training have no effect.

    Raises:
      ValueError: as :func:`bnjax.normalize`.

    Examples:
      >>> import jax, jax.numpy as jnp, bnjax
      >>> norm, x = bnjax.linen.FrozenBatchNorm(epsilon=3.0), jnp.array([[2.0], [6.0]])
      >>> variables = norm.init(jax.random.key(0), x)
      >>> print(norm.apply(variables, x).ravel())
      [1. 3.]
      >>> grads = jax.grad(lambda params: norm.apply({**variables, "params": params}, x).sum())(variables["params"])
      >>> print(grads["scale"], grads["bias"])
      [0.] [0.]

    References:
      He, Zhang, Ren & Sun 2016, https://arxiv.org/abs/1512.03385, appendix A.
    """
