"""Defines `GhostBatchNorm` for flax.linen."""

from bnjax.functional.variants._ghost_batch_norm import Ghost
from bnjax.linen.batch_norm import BatchNorm


class GhostBatchNorm(Ghost, BatchNorm):
    r"""Batch normalization by the statistics of virtual batches, which are slices of consecutive examples.

    .. math:: y_i = \frac{x_i - \mathrm{mean}_l}{\sqrt{\mathrm{var}_l + \epsilon}} \cdot \mathrm{scale} + \mathrm{bias}

    for the examples i of virtual batch l; see :func:`bnjax.ghost_batch_norm`. Variables and evaluation are those of
    :class:`bnjax.linen.BatchNorm`; the running averages follow the moments of all rows.

    Attributes:
      virtual_batch_size: examples per virtual batch; the last one may be smaller.
      num_virtual_batches: the number of virtual batches in the examples of each device, instead of their size.
      axis_name: name, or names, of the mapped axes whose devices the running averages follow; y is computed on each
        device by itself.

    The other attributes are those of :class:`bnjax.linen.BatchNorm`.

    Raises:
      ValueError: not exactly one of the two is given; also as :class:`bnjax.linen.BatchNorm`.

    Examples:
      >>> import jax, jax.numpy as jnp, bnjax
      >>> norm, x = bnjax.linen.GhostBatchNorm(virtual_batch_size=2), jnp.array([[1.0], [3.0], [50.0], [70.0]])
      >>> variables = norm.init(jax.random.key(0), x, use_running_average=False)
      >>> y, updates = norm.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
      >>> print(jnp.round(y, 2).ravel())
      [-1.  1. -1.  1.]

    References:
      Hoffer, Hubara & Soudry 2017, https://arxiv.org/abs/1705.08741, algorithm 1.
    """

    virtual_batch_size: int | None = None
    num_virtual_batches: int | None = None
