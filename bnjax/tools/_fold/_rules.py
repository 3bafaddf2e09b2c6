"""The arithmetic of folding: y = a·x + c per channel, moved into the kernel and bias before or after it.

previous:  a·(W∗u + b) + c = (a·W)∗u + (a·b + c)          a along the outputs of W
next:      W∗(a·x + c) + b = (W·a)∗x + (b + ΣW·c)         a along the inputs of W, where nothing is padded with zeros
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnjax.functional import RunningStats
from bnjax.tools._fold._pairs import Match
from bnjax.tools._fold._sites import Norm, affine_of

Leaves = dict[str, jax.Array]  # the variables of one layer by name


def affine(norm: Norm, leaves: Leaves) -> tuple[jax.Array, jax.Array]:
    """Returns a and c of y = a·x + c, in float32 at least."""
    wide = {name: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) for name, leaf in leaves.items()}
    scale = wide["scale"] + norm.scale_offset if "scale" in wide else None
    return affine_of(norm, RunningStats(wide["mean"], wide["var"]), scale, wide.get("bias"))


def into_layer(match: Match, a: jax.Array, c: jax.Array, layer: Leaves) -> Leaves:
    """Returns the kernel and bias of a layer with a normalization folded into it; [lead..., C] each of a and c."""
    site: Any = match.layer.layer
    kernel = layer["kernel"].astype(jnp.promote_types(layer["kernel"].dtype, jnp.float32))
    if match.channels is not None:
        there, index = match.channels >= 0, np.maximum(match.channels, 0)
        a, c = jnp.where(there, a[..., index], 1), jnp.where(there, c[..., index], 0)
    if match.side == "previous":
        scaled = kernel * _along(a, kernel.ndim, site.out_axis)
        return {**layer, "kernel": scaled, "bias": a * layer.get("bias", 0) + c / match.factor}
    kernel = kernel.swapaxes(-1, site.out_axis)
    shift = jnp.sum(_by_input(kernel, c * match.factor, site.groups), range(kernel.ndim - site.rank, kernel.ndim - 1))
    scaled = _by_input(kernel, a, site.groups).swapaxes(-1, site.out_axis)
    return {**layer, "kernel": scaled, "bias": layer.get("bias", 0) + shift}


def shifted(norm: Norm, leaves: Leaves, shift: jax.Array) -> Leaves:
    """Returns variables with which most normalizations are x + shift: (1 − ε) + ε is 1 in float32 too."""
    one = jnp.ones_like(shift.real)
    in_bias = "bias" in leaves and not jnp.iscomplexobj(shift)  # a complex shift has no place in a real bias
    new = {
        "mean": jnp.zeros_like(shift) if in_bias else -shift,
        "var": (1 - norm.epsilon) * one,
        "scale": (1 - norm.scale_offset) * one,
        "bias": shift if in_bias else jnp.zeros_like(one),
    }
    return leaves | {name: leaf for name, leaf in new.items() if name in leaves}


def take_row(norm: Norm, leaves: Leaves) -> Leaves:
    """Returns the variables of a normalization, those of one domain where it has several: `[lead..., D, C]`."""
    if norm.row is None:
        return leaves
    return {name: leaf if _shared(norm, name) else leaf[..., norm.row, :] for name, leaf in leaves.items()}


def put_row(norm: Norm, row: Leaves, leaves: Leaves) -> Leaves:
    """Returns the variables in the shapes they had. What was folded is one domain's, and so every row is that one's."""
    if norm.row is None:
        return row
    whole = {name: leaf if _shared(norm, name) else leaf[..., None, :] for name, leaf in row.items()}
    return {name: jnp.broadcast_to(leaf, leaves[name].shape) for name, leaf in whole.items()}


def _shared(norm: Norm, name: str) -> bool:
    return norm.shared_affine and name in ("scale", "bias")


def _along(vector: jax.Array, rank: int, axis: int) -> jax.Array:
    """Returns a vector [lead..., C] at the rank of a kernel, its channels at `axis` (counted from the end)."""
    *lead, channels = vector.shape
    shape = [*lead, *[1] * (rank - len(lead))]
    shape[axis] = channels
    return vector.reshape(shape)


def _by_input(kernel: jax.Array, vector: jax.Array, groups: int) -> jax.Array:
    """Multiplies kernel [lead..., spatial..., in/groups, out] by a vector [lead..., in]: every output by its group."""
    *front, inputs, outputs = kernel.shape
    *lead, _ = vector.shape
    factors = vector.reshape(*lead, *[1] * (len(front) - len(lead)), groups, inputs).swapaxes(-1, -2)[..., None]
    return (kernel.reshape(*front, inputs, groups, outputs // groups) * factors).reshape(kernel.shape)
