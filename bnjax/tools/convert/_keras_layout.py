"""The axes of Keras' kernels and of Flax's."""

from collections.abc import Mapping, Sequence

import numpy as np

from bnjax.tools.convert._correspondence import Array, Leaf
from bnjax.tools.convert._kernels import Kernels
from bnjax.tools.convert._options import check_mapping, check_modules


def multipliers_of(given: Mapping[str, int] | None, leaves: Sequence[Leaf]) -> dict[str, int]:
    """Returns the argument `depthwise`, once it names depthwise kernels and divides their channels; 1 if separable."""
    given = check_mapping("depthwise", given, '{"conv": 1}')
    kernels = {leaf.module: leaf for leaf in leaves if leaf.role == "kernel" and len(leaf.shape) > 2}
    channels = {module: leaf.shape[-1] for module, leaf in kernels.items() if leaf.shape[-2] == 1}
    check_modules("depthwise", given, list(channels), "kernels of depthwise convolutions, [..., 1, out]")
    for module, multiplier in given.items():
        if not isinstance(multiplier, (int, np.integer)) or multiplier < 1 or channels[module] % multiplier:
            raise ValueError(
                f"depthwise: what {module} is given must divide its {channels[module]} channels; got {multiplier!r}"
            )
    separable = {module for module, leaf in kernels.items() if leaf.key.endswith("/depthwise_kernel")}
    return dict.fromkeys(separable, 1) | dict(given)


def to_flax_axes(value: Array, leaf: Leaf, kernels: Kernels) -> Array:
    """Returns a value of Keras in Flax's order of axes."""
    if leaf.role == "steps":
        return np.broadcast_to(value, leaf.shape)
    if leaf.role != "kernel" or value.ndim < 3:
        return value
    is_depthwise = leaf.shape[-2] == 1 and value.shape[-2] > 1
    plain = value.reshape(*value.shape[:-2], 1, -1) if is_depthwise else value
    return kernels.chosen(leaf, plain, _mirrored(value, leaf, kernels), leaf.shape)


def to_keras_axes(value: Array, leaf: Leaf, kernels: Kernels, multipliers: Mapping[str, int]) -> Array:
    """Returns a value of Flax in Keras' order of axes: the inverse of `to_flax_axes`."""
    if leaf.role != "kernel" or value.ndim < 3:
        return value
    if leaf.module in multipliers:
        return value.reshape(*value.shape[:-2], -1, multipliers[leaf.module])
    if leaf.key.endswith("/pointwise_kernel"):
        return value
    return kernels.chosen(leaf, value, _mirrored(value, leaf, kernels), value.shape)


def _mirrored(kernel: Array, leaf: Leaf, kernels: Kernels) -> Array:
    """Turns [..., out, in], as the derivative of a convolution, to [..., in, out], as a convolution; and back."""
    if kernels.stores_transposed(leaf.module):
        return kernel
    return np.flip(kernel.swapaxes(-1, -2), tuple(range(kernel.ndim - 2)))
