"""The arithmetic of folding: y = a·x + c per channel, moved into the kernel and bias before or after it.

previous:  a·(W∗u + b) + c = (a·W)∗u + (a·b + c)          a along the outputs of W
next:      W∗(a·x + c) + b = (W·a)∗x + (b + ΣW·c)         a along the inputs of W, where nothing is padded with zeros
"""

import jax
import jax.numpy as jnp

from bnjax.tools._fold_pairs import Match, Site

Leaves = dict[str, jax.Array]  # the variables of one layer by name


def fold_pair(match: Match, norm: Leaves, layer: Leaves, *, keep: bool) -> tuple[Leaves, Leaves]:
    """The variables of the normalization and of the layer after folding.

    With `keep` both have the leaves they had, and a shift for which the layer has no bias stays in the normalization
    (in front of the layer it cannot stay alone: then nothing is folded). Else the layer has a bias, and the
    normalization nothing left to do. Leading axes that vmap or scan gave to all leaves stay in front.
    """
    kernel = layer["kernel"].astype(jnp.promote_types(layer["kernel"].dtype, jnp.float32))
    a, c = _affine(match.norm, norm)
    identity = _shifted(match.norm, norm, jnp.zeros_like(c))
    if match.side == "previous":
        layer = {**layer, "kernel": kernel * _along(a, kernel.ndim, match.layer.out_axis)}
        if "bias" in layer or not keep:
            return identity, {**layer, "bias": a * layer.get("bias", 0) + c}
        return _shifted(match.norm, norm, c), layer
    if "bias" not in layer and keep:
        return norm, layer
    rows = tuple(range(kernel.ndim - match.layer.rank, kernel.ndim - 1))
    bias = layer.get("bias", 0) + jnp.sum(_by_input(kernel, c, match.layer.groups), rows)
    return identity, {**layer, "kernel": _by_input(kernel, a, match.layer.groups), "bias": bias}


def take_row(site: Site, norm: Leaves) -> Leaves:
    """The variables of a normalization, those of one domain where it has several: `[lead..., D, C]`."""
    if site.row is None:
        return norm
    return {name: leaf if _shared(site, name) else leaf[..., site.row, :] for name, leaf in norm.items()}


def put_row(site: Site, row: Leaves, norm: Leaves) -> Leaves:
    """The variables in the shapes they had. What was folded is one domain's, and so every row is that one's."""
    if site.row is None:
        return row
    whole = {name: leaf if _shared(site, name) else leaf[..., None, :] for name, leaf in row.items()}
    return {name: jnp.broadcast_to(leaf, norm[name].shape) for name, leaf in whole.items()}


def _shared(site: Site, name: str) -> bool:
    return site.shared_affine and name in ("scale", "bias")


def _affine(site: Site, norm: Leaves) -> tuple[jax.Array, jax.Array]:
    """a = scale/√(var + ε) and c = bias − mean·a."""
    mean, var = (norm[s].astype(jnp.promote_types(norm[s].dtype, jnp.float32)) for s in ("mean", "var"))
    scale = norm["scale"] + site.scale_offset if "scale" in norm else 1.0
    a = scale / jnp.sqrt(var + site.epsilon)
    return a, norm.get("bias", jnp.zeros_like(mean)) - mean * a


def _along(vector: jax.Array, rank: int, axis: int) -> jax.Array:
    """A vector [lead..., C] at the rank of a kernel, its channels at `axis` (counted from the end)."""
    *lead, channels = vector.shape
    shape = [*lead, *[1] * (rank - len(lead))]
    shape[axis] = channels
    return vector.reshape(shape)


def _by_input(kernel: jax.Array, vector: jax.Array, groups: int) -> jax.Array:
    """kernel [lead..., spatial..., in/groups, out] times a vector [lead..., in]: each output with its group of it."""
    *front, inputs, outputs = kernel.shape
    *lead, _ = vector.shape
    factors = vector.reshape(*lead, *[1] * (len(front) - len(lead)), groups, inputs).swapaxes(-1, -2)[..., None]
    return (kernel.reshape(*front, inputs, groups, outputs // groups) * factors).reshape(kernel.shape)


def _shifted(site: Site, norm: Leaves, shift: jax.Array) -> Leaves:
    """Variables with which the normalization is x + shift: (1 − ε) + ε is 1 in float32 too."""
    one = jnp.ones_like(shift.real)
    in_bias = "bias" in norm and not jnp.iscomplexobj(shift)  # a complex shift has no place in a real bias
    leaves = {
        "mean": jnp.zeros_like(shift) if in_bias else -shift,
        "var": (1 - site.epsilon) * one,
        "scale": (1 - site.scale_offset) * one,
        "bias": shift if in_bias else jnp.zeros_like(one),
    }
    return {name: leaf for name, leaf in leaves.items() if name in norm}
