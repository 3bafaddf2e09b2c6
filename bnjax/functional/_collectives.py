"""Pools statistics over devices: names the group of devices, adds sums over it, and types arrays for `check_vma`.

Inside `shard_map`, `pmap` or `vmap` an axis name stands for a set of devices (or of mapped slices). A `Group` says
whose rows are pooled; `pool` adds a stack of per-channel sums over the group in one all-reduce.
"""

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

AxisName = str | Sequence[str] | None


class Group(NamedTuple):
    """Holds which devices share statistics: names of mapped axes, and optionally groups of indices along them."""

    names: tuple[str, ...] = ()  # empty: this device alone (or, under plain jit, the whole array)
    index_groups: tuple[tuple[int, ...], ...] | None = None


def names_of(axis_name: AxisName) -> tuple[str, ...]:
    """Returns axis names as a tuple, empty for None; None in a sequence is left out."""
    names = (axis_name,) if isinstance(axis_name, str) or not isinstance(axis_name, Sequence) else tuple(axis_name)
    return tuple(name for name in names if name is not None)


def group_of(axis_name: AxisName, axis_index_groups: Sequence[Sequence[int]] | None, shape: tuple[int, ...]) -> Group:
    """Returns the group of devices that the arguments name.

    Args:
      axis_name: name, or names, of mapped axes, or None.
      axis_index_groups: groups of indices along them, or None.
      shape: of the batch, for the error.

    Raises:
      ValueError: a name is not bound here, or the groups do not divide the axes into parts of one size.
    """
    names = names_of(axis_name)
    for name in names:
        _check_bound(name, shape)
    if axis_index_groups is None:
        return Group(names)
    if not names:
        raise ValueError("axis_index_groups divides a named axis into groups: give its axis_name too.")
    if not set(names) <= set(jax.sharding.get_abstract_mesh().manual_axes):
        raise ValueError(
            f"axis_index_groups works on axes of shard_map and pmap; {axis_name!r} is one of vmap, where JAX has no "
            "grouped sums. Reshape the mapped axis to (groups, size), nest two vmaps and name the inner one alone."
        )
    groups = tuple(tuple(int(i) for i in g) for g in axis_index_groups)
    size = math.prod(lax.axis_size(name) for name in names)
    if sorted(i for g in groups for i in g) != list(range(size)):
        raise ValueError(
            f"axis_index_groups must hold each index 0 to {size - 1} of {axis_name!r} exactly once; got {groups}."
        )
    if len({len(g) for g in groups}) != 1:
        raise ValueError(
            f"axis_index_groups must all have one size, because TPU and GPU reduce only over such groups; got sizes "
            f"{[len(g) for g in groups]}. To give rows different weights pass `mask`."
        )
    return Group(names, groups)


def _check_bound(name: str, shape: tuple[int, ...]) -> None:
    """Raises ValueError if no mapped axis of this name is bound here; `shape` is that of the batch, for the error."""
    if isinstance(name, int):
        raise TypeError(f"axis_name must be the name of a mapped axis, or several; got the number {name}.")
    try:
        lax.axis_size(name)
    except NameError as error:
        raise ValueError(
            f"axis_name={name!r} is not an axis that is mapped here, where a batch of shape {shape} was about to be "
            "normalised. Inside shard_map, pmap or vmap(axis_name=...) pass the name that was given there; under "
            "plain jit pass axis_name=None: with a sharded array the statistics are those of the whole batch already."
        ) from error


def group_size(group: Group) -> int:
    """Returns how many devices share statistics."""
    if group.index_groups is not None:
        return len(group.index_groups[0])
    return math.prod(lax.axis_size(name) for name in group.names)


def pool(sums: Sequence[jax.Array], group: Group) -> Sequence[jax.Array]:
    """Adds each of several per-channel sums over the group, in one all-reduce.

    Real sums come back real, also where a complex one makes the stacked array complex.
    """
    if not group.names:
        return sums  # stacking them would only cost compile time
    try:
        pooled = lax.psum(jnp.stack(sums), group.names, axis_index_groups=group.index_groups)
    except NotImplementedError as error:  # the empty error that JAX raises under check_vma=True
        raise ValueError(
            "axis_index_groups does not work in shard_map(check_vma=True): JAX cannot type its result. Use a mesh of "
            "two axes, such as Mesh(devices.reshape(groups, size), ('group', 'member')), shard the batch over both and "
            "pass axis_name='member'; or use check_vma=False."
        ) from error
    return [p if jnp.iscomplexobj(s) else p.real for p, s in zip(pooled, sums, strict=True)]


def warn_if_local(running: jax.Array, batch: jax.Array, shape: tuple[int, ...]) -> None:
    """Warns where running averages that all devices share are to be updated with the moments of one device's rows.

    This can be seen only in shard_map(check_vma=True), which types arrays by the mesh axes over which they differ.

    Args:
      running: the running mean, `[C]`.
      batch: the mean of the batch, `[C]`.
      shape: of the batch, for the warning.
    """
    if names := varying(batch) - varying(running):
        warnings.warn(
            f"a batch of shape {shape} was normalised by this device's rows alone, though it is spread over the mesh "
            f"axes {sorted(names)}: the running averages now differ between devices. Pass axis_name={sorted(names)} to "
            "normalise by the whole batch; or stats_axis_name, to normalise by local statistics and average those of "
            "all devices; or update_stats=False.",
            stacklevel=4,
        )


def varying(x: jax.Array) -> frozenset[str]:
    """Returns the mesh axes over which devices may hold different x; empty unless in shard_map(check_vma=True)."""
    return frozenset(jax.typeof(x).mat.varying)


def vary_like(vector: jax.Array, x: jax.Array) -> jax.Array:
    """Returns `vector`, typed as varying over every mesh axis that x varies over."""
    missing = tuple(sorted(varying(x) - varying(vector)))
    return lax.pcast(vector, missing, to="varying") if missing else vector


def match(vector: jax.Array, like: jax.Array) -> jax.Array:
    """Returns `vector` in the type of `like`: varying, or with Explicit axes sharded, over the mesh axes of `like`."""
    sharding = jax.typeof(like).sharding
    if jax.typeof(vector).sharding.spec != sharding.spec:
        vector = jax.sharding.reshard(vector, sharding)
    return vary_like(vector, like)


def vary_together(vectors: tuple[jax.Array, ...], x: jax.Array) -> tuple[jax.Array, ...]:
    """Returns several vectors of one shape and type, typed as varying over every mesh axis that x varies over.

    Without this JAX would cast each vector where it first meets x. The transpose of a cast is an all-reduce, so a
    single cast of the stacked vectors makes the backward pass use a single all-reduce.
    """
    if all(varying(x) <= varying(v) for v in vectors):
        return vectors
    return tuple(vary_like(jnp.stack(vectors), x))
