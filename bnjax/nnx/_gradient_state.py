"""Variables that the backward pass updates: their gradient is their new value."""

import jax
from flax import nnx


class OverwriteWithGradient(nnx.Variable[jax.Array]):
    """A statistic of the gradient, whose own gradient is its new value: `nnx.update` it with that.

    Take the gradient in parameters and in these, `nnx.DiffState(0, nnx.Any(nnx.Param, OverwriteWithGradient))`, give
    the optimizer the parameters' part and `nnx.update(model, ...)` the other.
    """
