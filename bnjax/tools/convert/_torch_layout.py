"""The axes of PyTorch's kernels and of Flax's."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from bnjax.tools.convert._correspondence import Array, Leaf
from bnjax.tools.convert._kernels import Kernels
from bnjax.tools.convert._options import check_mapping, check_modules

Flattened = Mapping[str, tuple[int, ...]]  # dense layer -> (C, H, W) before flattening


def flattened_of(given: Mapping[str, Sequence[int]] | None, leaves: Sequence[Leaf]) -> Flattened:
    """Returns the argument `flattened`, once it names dense layers and shapes of as many elements as they read."""
    given = check_mapping("flattened", given, '{"fc": (C, H, W)}')
    dense = {leaf.module: leaf.shape[0] for leaf in leaves if leaf.role == "kernel" and len(leaf.shape) == 2}
    check_modules("flattened", given, list(dense), "kernels of dense layers")
    for module, shape in given.items():
        if not all(isinstance(n, (int, np.integer)) and n > 0 for n in shape) or math.prod(shape) != dense[module]:
            raise ValueError(
                f"flattened: {module} reads {dense[module]} inputs, and {tuple(shape)} does not make as many: give the "
                "shape (C, H, W) that they had before flattening."
            )
    return {module: tuple(shape) for module, shape in given.items()}


def to_flax_axes(value: Array, leaf: Leaf, flattened: Flattened, kernels: Kernels) -> Array:
    """Returns a value of PyTorch in Flax's order of axes."""
    if leaf.role == "steps":
        return np.broadcast_to(value, leaf.shape)
    if leaf.role != "kernel" or value.ndim < 2:
        return value
    if value.ndim == 2:
        value = value.T  # [out, in] → [in, out]
        return _channels_last(value, flattened[leaf.module]) if leaf.module in flattened else value
    spatial = tuple(range(2, value.ndim))
    plain, mirrored = value.transpose(*spatial, 1, 0), value.transpose(*spatial, 0, 1)  # that is [in, out, ...] there
    mirrored = plain if kernels.stores_transposed(leaf.module) else np.flip(mirrored, tuple(range(value.ndim - 2)))
    return kernels.chosen(leaf, plain, mirrored, leaf.shape)


def to_torch_axes(value: Array, leaf: Leaf, flattened: Flattened, kernels: Kernels) -> Array:
    """Returns a value of Flax in PyTorch's order of axes: the inverse of `to_flax_axes`."""
    if leaf.role == "steps":
        return np.asarray(value.max(initial=0), np.int64)
    if leaf.role != "kernel" or value.ndim < 2:
        return value
    if value.ndim == 2:
        return (_channels_first(value, flattened[leaf.module]) if leaf.module in flattened else value).T
    spatial = tuple(range(value.ndim - 2))
    plain, mirrored = value.transpose(-1, -2, *spatial), np.flip(value, spatial).transpose(-2, -1, *spatial)
    mirrored = plain if kernels.stores_transposed(leaf.module) else mirrored
    return kernels.chosen(leaf, plain, mirrored, plain.shape)


def _channels_last(value: Array, chw: Sequence[int]) -> Array:
    """Returns the rows of a kernel in the order in which Flax flattens the positions."""
    if len(value) != math.prod(chw):
        return value  # of another shape than the variables have, which the caller reports
    return np.moveaxis(value.reshape(*chw, -1), 0, -2).reshape(value.shape)


def _channels_first(value: Array, chw: Sequence[int]) -> Array:
    c, *hw = chw
    return np.moveaxis(value.reshape(*hw, c, -1), -2, 0).reshape(value.shape)
