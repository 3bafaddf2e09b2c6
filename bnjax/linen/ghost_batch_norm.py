"""`GhostBatchNorm` for flax.linen."""

from bnjax.functional._ghost_batch_norm import Ghost
from bnjax.linen.batch_norm import BatchNorm


class GhostBatchNorm(Ghost, BatchNorm):
    r"""Batch normalization by the statistics of virtual batches.

    .. math:: y_i = \frac{x_i - \mathrm{mean}_l}{\sqrt{\mathrm{var}_l + \epsilon}} \cdot \mathrm{scale} + \mathrm{bias}

    for the examples i of virtual batch l: :func:`bnjax.ghost_batch_norm`. Variables, evaluation and the running
    averages, which are those of all rows, as in :class:`bnjax.linen.BatchNorm`.

    Attributes:
      virtual_batch_size: examples per virtual batch; the last one may be smaller.
      num_virtual_batches: how many, instead, in what each device holds.
      axis_name: the mapped axes over which the running averages are those of everybody; y needs no other device.

    The others are those of :class:`bnjax.linen.BatchNorm`.

    Raises:
      ValueError: not one of the two is given, or as :class:`bnjax.linen.BatchNorm`.

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
