"""Defines `BatchRenorm` for flax.linen."""

from bnjax.functional import renorm_d_max, renorm_r_max
from bnjax.functional.variants._batch_renorm import Limit, Renorm
from bnjax.linen.batch_norm import BatchNorm


class BatchRenorm(Renorm, BatchNorm):
    r"""Batch renormalization: x is normalised by its batch and corrected towards the running averages.

    .. math::
        y = \Bigl(\frac{x - \mathrm{mean}_B}{\sigma_B} \cdot r + d\Bigr) \cdot \mathrm{scale} + \mathrm{bias}

    where r and d are computed from the moments of the batch and the running averages, and clipped; see
    :func:`bnjax.batch_renorm`. Evaluation and variables are those of :class:`bnjax.linen.BatchNorm`; where a limit
    depends on the step, one more variable, `steps`, counts the batches.

    Attributes:
      r_max: limit of r and 1/r: a number, or a function from the step 0, 1, ... to the limit. The default is that of
        the paper, :func:`bnjax.renorm_r_max`: 1 for 5000 steps, then linear to 3 at step 40 000.
      d_max: limit of \|d\|: a number, or a function from the step to the limit. The default is that of the paper,
        :func:`bnjax.renorm_d_max`: 0 for 5000 steps, then linear to 5 at step 25 000.

    The other attributes are those of :class:`bnjax.linen.BatchNorm`. The default momentum, 0.99, is the paper's.

    Raises:
      ValueError: as :func:`bnjax.batch_renorm` and :class:`bnjax.linen.BatchNorm`.

    Examples:
      >>> import jax, jax.numpy as jnp, bnjax
      >>> norm, x = bnjax.linen.BatchRenorm(r_max=3.0, d_max=5.0), jnp.array([[1.0], [2.0]])
      >>> variables = norm.init(jax.random.key(0), x, use_running_average=False)
      >>> y, updates = norm.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
      >>> print(jnp.round(y, 2).ravel())  # what the running averages 0 and 1 give
      [1. 2.]

    References:
      Ioffe 2017, https://arxiv.org/abs/1702.03275, algorithm 1 and section 4.

    Differences from the paper, TensorFlow and Keras: see :func:`bnjax.batch_renorm`.
    """

    r_max: Limit = renorm_r_max
    d_max: Limit = renorm_d_max
