"""The variables of all layers that take part in a fold, before and after it."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from bnjax.tools._fold._pairs import Match
from bnjax.tools._fold._rules import Leaves, affine, into_layer, put_row, shifted, take_row
from bnjax.tools._trees import Path, Tree, show

Layers = dict[Path, Leaves]  # the variables of each layer that takes part

# The identity as it is computed: two roundings of a, and of what (1 − ε) + ε became.
_IDENTITY = 8


def layers_of(tree: Tree, matches: list[Match]) -> Layers:
    """Returns the variables of the layers of some pairs, as they are."""
    layers: Layers = {site.path: {} for match in matches for site in (match.norm, match.layer)}
    for name, leaf in zip(tree.names, tree.leaves, strict=True):
        if name[:-1] in layers:
            layers[name[:-1]][name[-1]] = leaf
    return layers


def unfit(match: Match, layers: Layers) -> str:
    """Returns why the variables of a pair do not go together, or nothing."""
    layer = match.layer
    site: Any = layer.layer
    norm: Any = match.norm.layer
    row = take_row(norm, layers[match.norm.path])
    kernel, mean = layers[layer.path]["kernel"], row["mean"]
    if kernel.shape[: kernel.ndim - site.rank] != mean.shape[:-1]:
        return f"{show(layer.path)} is not stacked by vmap or scan as it is"
    previous, axis = match.side == "previous", site.out_axis
    size = kernel.shape[axis] if previous else kernel.shape[-3 - axis] * site.groups
    sizes = (
        (mean.shape[-1], mean.shape[-1]) if match.channels is None else (len(match.channels), max(match.channels) + 1)
    )
    if sizes[0] != size or sizes[1] > mean.shape[-1]:
        return f"its channels are not those of {show(layer.path)} as they are stored"
    if match.ordered and (negative := int(jnp.sum(affine(norm, row)[0] < 0))):
        return f"a max-pool stands between it and {show(layer.path)}, and {negative} channels have a negative scale"
    return ""


def fold_all(layers: Layers, matches: list[Match]) -> tuple[Layers, Layers]:
    """Returns the variables after all folds.

    A layer may take one normalization from before it and one from after it; several layers may take the same one.

    Returns:
      The variables of the old structure: normalizations are the identity, plus the shift for which the layer before
      them has no bias; where this cannot be, both stay. And those without the normalizations: every layer has a bias.
    """
    shifts = {m.norm.path for m in matches if "bias" not in layers[m.layer.path]}
    errors = jax.jit(partial(_errors_of_identity, matches, shifts))(layers)
    exact = [m for m in matches if errors[m.norm.path] <= _IDENTITY * jnp.finfo(jnp.float32).eps]
    # In front of a layer a shift cannot stay alone.
    stay = [m for m in exact if m.side == "previous" or m.norm.path not in shifts]
    kept, bare = (jax.jit(partial(_folded, *which))(layers) for which in ((stay, shifts), (matches, set())))
    return kept, bare


def _errors_of_identity(matches: list[Match], shifts: set[Path], layers: Layers) -> dict[Path, jax.Array]:
    """Returns how far normalizations are from x + shift with the variables meant for that, relatively."""
    errors = {}
    for match in matches:
        norm: Any = match.norm.layer
        row = take_row(norm, layers[match.norm.path])
        shift = affine(norm, row)[1] * (match.norm.path in shifts)
        a, c = affine(norm, shifted(norm, row, shift))
        off = jnp.max(jnp.abs(c - shift)) / jnp.maximum(1, jnp.max(jnp.abs(shift)))
        errors[match.norm.path] = jnp.maximum(jnp.max(jnp.abs(a - 1)), off)
    return errors


def _folded(matches: list[Match], shifts: set[Path], layers: Layers) -> Layers:
    """Returns the variables after some folds; those normalizations of which `shifts` has the path keep the shift."""
    before, layers = layers, dict(layers)
    for match in matches:
        norm: Any = match.norm.layer
        old, taker = before[match.norm.path], layers[match.layer.path]
        row = take_row(norm, old)
        a, c = affine(norm, row)
        new = into_layer(match, a, c, taker)
        stays = match.norm.path in shifts
        layers[match.layer.path] = {name: new[name] for name in taker} if stays else new
        layers[match.norm.path] = put_row(norm, shifted(norm, row, c * stays), old)
    return layers
