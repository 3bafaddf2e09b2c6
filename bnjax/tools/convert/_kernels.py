"""Whether a kernel is that of a convolution or of a transposed one, which other libraries store mirrored."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bnjax.tools.convert._correspondence import Array, Leaf
from bnjax.tools.convert._layers import Layer
from bnjax.tools.convert._options import check_modules

# The names that linen gives by itself.
_NAMED_CONV = re.compile(r"(.*/)?Conv_\d+")
_NAMED_TRANSPOSED = re.compile(r"(.*/)?ConvTranspose_\d+")


class Kernels(NamedTuple):
    """What is known of the convolutions: by the modules, by the caller, and by the other library's modules."""

    layers: Mapping[str, Layer]
    transposed: frozenset[str] | None  # these and no others; None where the caller says nothing
    elsewhere: Mapping[str, bool] = {}

    def is_transposed(self, module: str) -> bool | None:
        """Returns whether a module is a transposed convolution; None where nobody knows."""
        layer = self.layers.get(module)
        if layer is not None and layer.rank is not None:
            if self.elsewhere.get(module, layer.transposed) != layer.transposed:
                raise ValueError(f"{module} is a transposed convolution in one of the networks and not in the other.")
            return layer.transposed
        if self.transposed is not None:
            return module in self.transposed
        return self.elsewhere.get(module, False if _NAMED_CONV.fullmatch(module) else None)

    def is_named_transposed(self, module: str) -> bool:
        """Returns whether a module of which nothing else is known has the name of a transposed convolution."""
        return self.is_transposed(module) is None and _NAMED_TRANSPOSED.fullmatch(module) is not None

    def stores_transposed(self, module: str) -> bool:
        """Returns whether Flax keeps a transposed convolution's kernel as others do (`transpose_kernel`)."""
        return module in self.layers and self.layers[module].transpose_kernel

    def chosen(self, leaf: Leaf, plain: Array, mirrored: Array, shape: tuple[int, ...]) -> Array:
        """Returns the one of two readings of a kernel that is right; raises ValueError where that cannot be known.

        Args:
          leaf: the kernel.
          plain: it, read as that of a convolution.
          mirrored: it, read as that of a transposed convolution, stored as the module stores it.
          shape: the shape that the right one must have.
        """
        known = self.is_transposed(leaf.module)
        if known is not None:
            return mirrored if known else plain
        if plain.shape != shape or mirrored.shape != shape:
            return mirrored if mirrored.shape == shape else plain
        if np.array_equal(plain, mirrored, equal_nan=plain.dtype.kind in "fc"):
            return plain
        raise ValueError(
            f"{leaf.module}/kernel of shape {leaf.shape} fits a convolution as well as a transposed one, which other "
            "libraries store mirrored, and nothing says which it is. Give the nnx module in place of its state; or, "
            "for linen, apply_fn=model.apply and x=a sample, with which the model is traced; or name all transposed "
            f"convolutions: transposed=[{leaf.module!r}], or transposed=() if there are none."
        )


def kernels_of(
    leaves: Sequence[Leaf],
    layers: Mapping[str, Layer],
    transposed: Sequence[str] | None,
    elsewhere: Mapping[str, bool] | None = None,
) -> Kernels:
    """Returns what is known of the convolutions, once `transposed` names nothing else and no kernel is stacked."""
    kernels = {leaf.module: leaf for leaf in leaves if leaf.role == "kernel"}
    for module, leaf in kernels.items():
        rank = layers.get(module, Layer()).rank
        if rank is not None and len(leaf.shape) != rank:
            raise ValueError(
                f"{module}/kernel has shape {leaf.shape}, and that of one such layer {rank} axes: layers that are "
                "stacked by vmap or scan, or a DenseGeneral, have no counterpart elsewhere. Convert each by itself."
            )
    if transposed is None:
        return Kernels(layers, None, elsewhere or {})
    convolutions = [module for module, leaf in kernels.items() if len(leaf.shape) > 2]
    check_modules("transposed", transposed, convolutions, "kernels of convolutions")
    wrong = [m for m in transposed if layers.get(m, Layer()).rank is not None and not layers[m].transposed]
    if wrong:
        raise ValueError(f"transposed: {wrong} are no transposed convolutions in the model; leave them out.")
    return Kernels(layers, frozenset(transposed), elsewhere or {})
