"""Makes variables that the backward pass updates: the gradient of such a variable is its new value."""

from collections.abc import Mapping

import flax.linen as nn
import jax
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT


def gradient_state(module: nn.Module, start: Mapping[str, jax.Array]) -> dict[str, jax.Array] | None:
    """Returns the values of a module's variables that the backward pass updates, or None if they were not passed.

    They are in the collection `_overwrite_with_gradient` and are created in `init`.

    Args:
      module: the layer.
      start: the value at which each variable starts, by name.
    """
    there = all(module.has_variable(OVERWRITE_WITH_GRADIENT, name) for name in start)
    if not (there or module.is_initializing()):
        return None
    return {k: module.variable(OVERWRITE_WITH_GRADIENT, k, lambda v=v: v).value for k, v in start.items()}
