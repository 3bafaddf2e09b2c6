"""Defines `GhostBatchNorm` for flax.nnx."""

from collections.abc import Sequence
from typing import Any

from bnjax.functional.variants._ghost_batch_norm import Ghost
from bnjax.nnx.batch_norm import BatchNorm


class GhostBatchNorm(Ghost, BatchNorm):
    r"""Batch normalization by the statistics of virtual batches, which are slices of consecutive examples.

    .. math:: y_i = \frac{x_i - \mathrm{mean}_l}{\sqrt{\mathrm{var}_l + \epsilon}} \cdot \mathrm{scale} + \mathrm{bias}

    for the examples i of virtual batch l; see :func:`bnjax.ghost_batch_norm`. Variables and evaluation are those of
    :class:`bnjax.nnx.BatchNorm`; the running averages follow the moments of all rows.

    Args:
      num_features: size of the feature axis, or sizes of several; see :class:`bnjax.nnx.BatchNorm`.
      virtual_batch_size: examples per virtual batch; the last one may be smaller.
      num_virtual_batches: the number of virtual batches in the examples of each device, instead of their size.
      fields: those of :class:`bnjax.nnx.BatchNorm`. `axis_name` names the mapped axes whose devices the running
        averages follow; y is computed on each device by itself.

    Raises:
      ValueError: not exactly one of the two is given; also as :class:`bnjax.nnx.BatchNorm`.

    Examples:
      >>> import jax.numpy as jnp, bnjax
      >>> from flax import nnx
      >>> norm = bnjax.nnx.GhostBatchNorm(1, virtual_batch_size=2, rngs=nnx.Rngs(0))
      >>> print(jnp.round(norm(jnp.array([[1.0], [3.0], [50.0], [70.0]])), 2).ravel())
      [-1.  1. -1.  1.]

    References:
      Hoffer, Hubara & Soudry 2017, https://arxiv.org/abs/1705.08741, algorithm 1.
    """

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        virtual_batch_size: int | None = None,
        num_virtual_batches: int | None = None,
        **fields: Any,
    ):
        self.virtual_batch_size = virtual_batch_size
        self.num_virtual_batches = num_virtual_batches
        super().__init__(num_features, **fields)
