"""Ghost batch normalization: the statistics of small virtual batches, whatever the size of the batch."""

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

    for the examples i of virtual batch l: the noise that regularises small batches, at the speed of large ones.

    y needs no word from other devices: virtual batches are cut from the examples that this program holds. Inside
    `shard_map`, with one virtual batch per device, that is batch normalization per device. Under plain `jit`, with as
    many virtual batches as shards, XLA exchanges no more than whether any of them needs the guard of
    :func:`bnjax.batch_moments`; others may lie across shards too, but not with Explicit mesh axes, where JAX refuses to
    cut an array so. Virtual batches of several devices are `bnjax.batch_norm` with the group of devices in
    `axis_name`.

    Args:
      x: `[N, ..., C]`; the first axis that is no feature axis is the one that is cut, into consecutive examples.
      scale: `[C]`, or None for 1.
      bias: `[C]`, or None for 0.
      virtual_batch_size: examples per virtual batch; where it does not divide N, the last virtual batch is smaller.
        With N or more there is one.
      num_virtual_batches: how many, instead; where they do not divide N, the last ones are smaller by one. With N or
        more there is one for each example.
      axis: the feature axis or axes; all others are reduced over.
      epsilon: added to the variance; positive.
      mask: non-negative weights (bool, integer or float), broadcastable to x; see :func:`bnjax.batch_norm`.
      axis_name: name, or names, of the mapped axes over which the returned moments are those of all devices: two
        all-reduces of a few numbers per channel, for which y does not wait (:func:`bnjax.pool_moments`).
      axis_index_groups: groups of indices along `axis_name`, of one size, that share these moments.
      dtype: of y; by default the promotion of x, scale and bias.

    Returns:
      y, of the shape of x, and the `Moments` of all virtual batches together, each `[C]`: exactly those of the whole
      batch, for the running averages.

    Raises:
      ValueError: not one of `virtual_batch_size` and `num_virtual_batches` is given, or it is not positive; x has
        feature axes only; virtual batches cross the shards of an Explicit mesh; else as :func:`bnjax.batch_norm`.
      TypeError: as :func:`bnjax.batch_norm`.

    Examples:
      >>> import jax.numpy as jnp, bnjax
      >>> x = jnp.array([[1.0], [3.0], [50.0], [70.0], [6.0]])
      >>> y, moments = bnjax.ghost_batch_norm(x, virtual_batch_size=2)
      >>> print(jnp.round(y, 2).ravel(), moments.mean, moments.count)
      [-1.  1. -1.  1.  0.] [26.] [5.]

    References:
      Hoffer, Hubara & Soudry 2017, https://arxiv.org/abs/1705.08741, algorithm 1.

    Differences: the paper's running averages take a step for each virtual batch, with its variance; here one for the
    batch, with the variance of all rows, so that evaluation takes the variance between virtual batches into account.
    """
    x = _axes.as_input(x)
    layout = _axes.layout_of(x, axis)
    if not layout.rows:
        raise ValueError(f"x needs an axis to cut into virtual batches; got {x.shape} with axis={axis!r}.")
    _collectives.group_of(axis_name, axis_index_groups, x.shape)  # before the work, and says what x is
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
    """Says what a GhostBatchNorm computes; a module adds the two fields."""

    virtual_batch_size: int | None
    num_virtual_batches: int | None

    def normalize_batch(self, x: jax.Array, running: RunningStats, **options: Any) -> tuple[jax.Array, Moments]:
        """Normalises each virtual batch by itself; the moments are those of all rows."""
        options |= dict(virtual_batch_size=self.virtual_batch_size, num_virtual_batches=self.num_virtual_batches)
        return ghost_batch_norm(x, **options)

    averaged_moments = Normalization.averaged_moments


def _sizes(examples: int, size: int | None, number: int | None) -> list[tuple[int, int]]:
    """Virtual batches of equal size, as (how many, examples in each): one kind or two."""
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
    """An explicitly sharded axis can be divided into whole parts of its shards, and not otherwise."""
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
    """The examples from start on, their axis divided into (number, size)."""
    if a is None:
        return None
    if a.shape[cut] == 1:  # a mask that is the same for all examples, or the only example
        return jnp.expand_dims(a, cut)
    a = jax.lax.slice_in_dim(a, start, start + number * size, axis=cut)
    return a.reshape(*a.shape[:cut], number, size, *a.shape[cut + 1 :])


def _lead(layout: _axes.Layout) -> int:
    """Where the virtual batches stand among the feature axes."""
    return sum(a < layout.rows[0] for a in layout.features)


def _side_by_side(
    layout: _axes.Layout, number: int, vectors: dict[str, Any], pieces: dict[str, Any], **options: Any
) -> tuple[jax.Array, Moments]:
    """Virtual batches of one size: their number is one more feature axis."""
    cut, lead = layout.rows[0], _lead(layout)
    axis = (*(a + (a > cut) for a in layout.features), cut)
    shape = (*layout.shape[:lead], number, *layout.shape[lead:])
    each: dict[str, Any] = {
        k: v if v is None else jnp.broadcast_to(jnp.expand_dims(v, lead), shape) for k, v in vectors.items()
    }
    y, moments = batch_norm(**pieces, **each, axis=axis, **options)
    return jax.lax.collapse(y, cut, cut + 2), moments


def _merged(parts: list[Moments], lead: int) -> Moments:
    """What `merge_moments` gives for the virtual batches, which stand on axis `lead`."""
    means, variances, counts = (jnp.concatenate(values, lead) for values in zip(*parts, strict=True))
    count = counts.sum(lead)
    share = counts / jnp.expand_dims(jnp.where(count > 0, count, 1), lead)
    mean = (share * means).sum(lead)
    step = means - jnp.expand_dims(mean, lead)
    return Moments(mean, (share * (variances + squared(step))).sum(lead), count)
