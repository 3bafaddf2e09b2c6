"""Defines `BatchRenorm` for flax.nnx."""

from collections.abc import Sequence
from typing import Any

from bnjax.functional import renorm_d_max, renorm_r_max
from bnjax.functional.variants._batch_renorm import Limit, Renorm
from bnjax.nnx.batch_norm import BatchNorm


class BatchRenorm(Renorm, BatchNorm):
    r"""Batch renormalization: x is normalised by its batch and corrected towards the running averages.

    .. math::
        y = \Bigl(\frac{x - \mathrm{mean}_B}{\sigma_B} \cdot r + d\Bigr) \cdot \mathrm{scale} + \mathrm{bias}

    where r and d are computed from the moments of the batch and the running averages, and clipped; see
    :func:`bnjax.batch_renorm`. Evaluation and variables are those of :class:`bnjax.nnx.BatchNorm`; where a limit
    depends on the step, one more variable, `steps`, counts the batches.

    Args:
      num_features: size of the feature axis, or sizes of several; see :class:`bnjax.nnx.BatchNorm`.
      r_max: limit of r and 1/r: a number, or a function from the step 0, 1, ... to the limit. The default is that of
        the paper, :func:`bnjax.renorm_r_max`: 1 for 5000 steps, then linear to 3 at step 40 000.
      d_max: limit of \|d\|: a number, or a function from the step to the limit. The default is that of the paper,
        :func:`bnjax.renorm_d_max`: 0 for 5000 steps, then linear to 5 at step 25 000.
      fields: those of :class:`bnjax.nnx.BatchNorm`. The default momentum, 0.99, is the paper's.

    Raises:
      ValueError: as :func:`bnjax.batch_renorm` and :class:`bnjax.nnx.BatchNorm`.

    Examples:
      >>> import jax.numpy as jnp, bnjax
      >>> from flax import nnx
      >>> norm = bnjax.nnx.BatchRenorm(1, r_max=3.0, d_max=5.0, rngs=nnx.Rngs(0))
      >>> print(jnp.round(norm(jnp.array([[1.0], [2.0]])), 2).ravel())  # what the running averages 0 and 1 give
      [1. 2.]

    References:
      Ioffe 2017, https://arxiv.org/abs/1702.03275, algorithm 1 and section 4.

    Differences from the paper, TensorFlow and Keras: see :func:`bnjax.batch_renorm`.
    """

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        r_max: Limit = renorm_r_max,
        d_max: Limit = renorm_d_max,
        **fields: Any,
    ):
        self.r_max, self.d_max = r_max, d_max
        super().__init__(num_features, **fields)
