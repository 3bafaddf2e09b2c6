"""Defines the variables that the backward pass updates: the gradient of such a variable is its new value."""

import jax
from flax import nnx


class OverwriteWithGradient(nnx.Variable[jax.Array]):
    """Variable for a statistic of the gradient, whose gradient is its new value.

    Differentiate with respect to parameters and these variables, by
    `nnx.DiffState(0, nnx.Any(nnx.Param, OverwriteWithGradient))`. Pass the gradients of the parameters to the
    optimizer, and those of these variables to `nnx.update(model, ...)`.

    Args:
      value: the statistic: `projection` `[C]` of :class:`PowerNorm`, or `recent` of :class:`MovingAverageBatchNorm`.
      hijax, ref, eager_sharding, metadata: as for every `nnx.Variable`.

    Examples:
      >>> import jax.numpy as jnp, bnjax
      >>> from flax import nnx
      >>> norm, x = bnjax.nnx.PowerNorm(1, rngs=nnx.Rngs(0)), jnp.array([[3.0], [1.0]])
      >>> trained = nnx.DiffState(0, nnx.Any(nnx.Param, bnjax.nnx.OverwriteWithGradient))
      >>> grads = nnx.grad(lambda norm: norm(x)[0, 0], argnums=trained)(norm)
      >>> nnx.update(norm, nnx.filter_state(grads, bnjax.nnx.OverwriteWithGradient))
      >>> print(f"{norm.projection[0]:.3f}")
      0.150
    """
