"""Variables that the backward pass updates: their gradient is their new value."""

from collections.abc import Mapping

import flax.linen as nn
import jax
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT


def gradient_state(module: nn.Module, start: Mapping[str, jax.Array]) -> dict[str, jax.Array] | None:
    """The module's variables of these names, or None where the collection was not passed; made in `init`."""
    there = all(module.has_variable(OVERWRITE_WITH_GRADIENT, name) for name in start)
    if not (there or module.is_initializing()):
        return None
    return {k: module.variable(OVERWRITE_WITH_GRADIENT, k, lambda v=v: v).value for k, v in start.items()}
