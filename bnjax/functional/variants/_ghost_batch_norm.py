"""Implements ghost batch normalization: each small virtual batch is normalised by its own statistics."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from bnjax.functional import _axes, _collectives
from bnjax.functional._batch_norm import batch_norm
from bnjax.functional._measure import squared
from bnjax.functional._merge import pool_moments
from bnjax.functional._moments import Moments
from bnjax.functional._protocol import Normalization
from bnjax.functional._running import RunningStats


def ghost_batch_norm(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    virtual_batch_size: int | None = None,
    num_virtual_batches: int | None = None,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-5,
    mask: jax.Array | None = None,
    axis_name: _collectives.AxisName = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> tuple[jax.Array, Moments]:
    r"""Normalises each virtual batch, a slice of consecutive examples, by its own mean and variance.

    .. math:: y_i = \frac{x_i - \mathrm{mean}_l}{\sqrt{\mathrm{var}_l + \epsilon}} \cdot \mathrm{scale} + \mathrm{bias}

    for the examples i of virtual batch l. The statistics of small batches add noise, which regularises; here a large
    batch has that noise and is still computed at once.

    y needs no communication between devices: virtual batches are cut from the examples that this program holds. Inside
    `shard_map`, with one virtual batch per device, this is batch normalization per device. Under plain `jit`, with as
    many virtual batches as shards, XLA exchanges only whether any of them needs its second sum about the mean (see
    :func:`bnjax.batch_moments`). With other numbers virtual batches may lie across shards, except with Explicit mesh
    axes, where JAX refuses to cut an array that way. For virtual batches that span several devices use
    `bnjax.batch_norm` with that group of devices in `axis_name`.

    Args:
      x: `[N, ..., C]`; the first axis that is not a feature axis is cut into slices of consecutive examples.
      scale: `[C]`, or None for 1.
      bias: `[C]`, or None for 0.
      virtual_batch_size: examples per virtual batch; where it does not divide N, the last virtual batch is smaller.
        If it is N or more, there is one virtual batch. Give this or `num_virtual_batches`.
      num_virtual_batches: the number of virtual batches; where it does not divide N, the last ones have one example
        less. If it is N or more, each example is a virtual batch.
      axis: the feature axis or axes; all others are reduced over.
      epsilon: added to the variance; positive.
      mask: non-negative weights (bool, integer or float), broadcastable to x; see :func:`bnjax.batch_norm`.
      axis_name: name, or names, of the mapped axes over which the returned moments are pooled, by two all-reduces of
        a few numbers per channel (:func:`bnjax.pool_moments`); y does not depend on them.
      axis_index_groups: groups of indices along `axis_name`, of one size, that share these moments.
      dtype: of y; by default the promotion of x, scale and bias.

    Returns:
      y, of the shape of x, and the `Moments` of all virtual batches together, each `[C]`: exactly those of the whole
      batch, for the running averages.

    Raises:
      ValueError: not exactly one of `virtual_batch_size` and `num_virtual_batches` is given, or it is not positive; x
        has only feature axes; virtual batches cross the shards of an Explicit mesh; else as :func:`bnjax.batch_norm`.
      TypeError: as :func:`bnjax.batch_norm`.

    Examples:
      >>> import jax.numpy as jnp, bnjax
      >>> x = jnp.array([[1.0], [3.0], [50.0], [70.0], [6.0]])
      >>> y, moments = bnjax.ghost_batch_norm(x, virtual_batch_size=2)
      >>> print(jnp.round(y, 2).ravel(), moments.mean, moments.count)
      [-1.  1. -1.  1.  0.] [26.] [5.]

    References:
      Hoffer, Hubara & Soudry 2017, https://arxiv.org/abs/1705.08741, algorithm 1.

    Differences: in the paper the running averages take a step for each virtual batch, with its variance. Here they take
    one step for the whole batch, with the variance of all rows, so that evaluation includes the variance between
    virtual batches.
    """
    x = _axes.as_input(x)
    layout = _axes.layout_of(x, axis)
    if not layout.rows:
        raise ValueError(f"x needs an axis to cut into virtual batches; got {x.shape} with axis={axis!r}.")
    _collectives.group_of(axis_name, axis_index_groups, x.shape)  # raises here, where the shape of x is known
    arrays = dict(x=x, mask=_axes.as_mask(mask, x))
    vectors = dict(scale=scale, bias=bias)
    vectors = {name: _axes.as_optional(name, v, layout, x) for name, v in vectors.items()}
    dtype = _axes.output_dtype(dtype, x, vectors["scale"], vectors["bias"])
    side_by_side = partial(_side_by_side, layout, epsilon=epsilon, dtype=dtype)
    parts, start, cut = [], 0, layout.rows[0]
    kinds = _sizes(x.shape[cut], virtual_batch_size, num_virtual_batches)
    _check_within_shards(x, cut, kinds)
    for number, size in kinds:
        pieces = {name: _piece(a, cut, start, number, size) for name, a in arrays.items()}
        parts.append(side_by_side(number, vectors, pieces))
        start += number * size
    y = jnp.concatenate([y for y, _ in parts], cut)
    moments = _merged([moments for _, moments in parts], _lead(layout))
    if axis_name is None:
        return y, moments
    return y, pool_moments(moments, axis_name=axis_name, axis_index_groups=axis_index_groups)


class Ghost(Normalization):
    """Describes a GhostBatchNorm layer to the modules and tools; a module adds the two fields."""

    virtual_batch_size: int | None
    num_virtual_batches: int | None

    def normalize_batch(self, x: jax.Array, running: RunningStats, **options: Any) -> tuple[jax.Array, Moments]:
        """Normalises each virtual batch by its own statistics; returns y and the moments of all rows."""
        options |= dict(virtual_batch_size=self.virtual_batch_size, num_virtual_batches=self.num_virtual_batches)
        return ghost_batch_norm(x, **options)

    averaged_moments = Normalization.averaged_moments


def _sizes(examples: int, size: int | None, number: int | None) -> list[tuple[int, int]]:
    """Returns pairs (number of virtual batches, examples in each): one pair, or two where they differ in size."""
    given = number if size is None else size
    if (size is None) == (number is None) or (isinstance(given, int) and given < 1):
        raise ValueError(
            "give one of virtual_batch_size and num_virtual_batches, and it must be positive; "
            f"got virtual_batch_size={size} and num_virtual_batches={number}."
        )
    if size is not None:
        whole, rest = divmod(examples, _axes.as_integer("virtual_batch_size", size, 1))
        return [kind for kind in ((whole, size), (1, rest)) if all(kind)] or [(1, 0)]
    number = max(1, min(_axes.as_integer("num_virtual_batches", number, 1), examples))
    size, larger = divmod(examples, number)
    return [kind for kind in ((larger, size + 1), (number - larger, size)) if kind[0]]


def _check_within_shards(x: jax.Array, cut: int, kinds: list[tuple[int, int]]) -> None:
    """Raises ValueError if virtual batches would cross the shards of an Explicit mesh axis, which JAX refuses."""
    sharding = jax.typeof(x).sharding
    names = sharding.spec[cut] or ()
    shards = math.prod(sharding.mesh.shape[name] for name in ((names,) if isinstance(names, str) else names))
    if shards > 1 and (len(kinds) > 1 or kinds[0][0] % shards):
        raise ValueError(
            f"virtual batches must lie within the {shards} shards of an explicitly sharded axis; got "
            f"{' and '.join(f'{number} of {size}' for number, size in kinds)} examples for x {jax.typeof(x)}. Take a "
            f"number of them that {shards} divides, or jax.sharding.reshard x, or a mesh of Auto axes."
        )


def _piece(a: jax.Array | None, cut: int, start: int, number: int, size: int) -> jax.Array | None:
    """Returns the examples from `start` on, with their axis reshaped to the two axes (number, size)."""
    if a is None:
        return None
    if a.shape[cut] == 1:  # a mask that is the same for all examples, or the only example
        return jnp.expand_dims(a, cut)
    a = jax.lax.slice_in_dim(a, start, start + number * size, axis=cut)
    return a.reshape(*a.shape[:cut], number, size, *a.shape[cut + 1 :])


def _lead(layout: _axes.Layout) -> int:
    """Returns the position of the axis of virtual batches among the feature axes."""
    return sum(a < layout.rows[0] for a in layout.features)


def _side_by_side(
    layout: _axes.Layout, number: int, vectors: dict[str, Any], pieces: dict[str, Any], **options: Any
) -> tuple[jax.Array, Moments]:
    """Normalises virtual batches of one size at once, with the axis of virtual batches as one more feature axis.

    Args:
      layout: of x.
      number: how many virtual batches.
      vectors: scale and bias, each `[C]` or None.
      pieces: x and the mask, with the axis of examples reshaped to (number, size).
      options: epsilon and dtype, as in `batch_norm`.

    Returns:
      y in the layout of x, and moments with the axis of virtual batches at `_lead(layout)`.
    """
    cut, lead = layout.rows[0], _lead(layout)
    axis = (*(a + (a > cut) for a in layout.features), cut)
    shape = (*layout.shape[:lead], number, *layout.shape[lead:])
    each: dict[str, Any] = {
        k: v if v is None else jnp.broadcast_to(jnp.expand_dims(v, lead), shape) for k, v in vectors.items()
    }
    y, moments = batch_norm(**pieces, **each, axis=axis, **options)
    return jax.lax.collapse(y, cut, cut + 2), moments


def _merged(parts: list[Moments], lead: int) -> Moments:
    """Merges the moments of virtual batches, which stand along axis `lead`, into those of all rows."""
    means, variances, counts = (jnp.concatenate(values, lead) for values in zip(*parts, strict=True))
    count = counts.sum(lead)
    share = counts / jnp.expand_dims(jnp.where(count > 0, count, 1), lead)
    mean = (share * means).sum(lead)
    step = means - jnp.expand_dims(mean, lead)
    return Moments(mean, (share * (variances + squared(step))).sum(lead), count)
