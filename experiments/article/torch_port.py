"""The PyTorch program of the article's section 4.2, repaired, in Flax and Optax.

What PyTorch does otherwise than Flax: BatchNorm2d averages with momentum 0.9 (which it calls 0.1), and the variance
that it averages is the unbiased one; weights and biases are drawn uniformly within ±1/√(inputs of a unit).
"""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from bnjax.linen import BatchNorm
from bnjax.tools import fields_from_torch, from_torch, to_torch


def within(bound: float) -> nn.initializers.Initializer:
    """Returns an initializer that draws uniformly between −bound and bound."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class TorchNet(nn.Module):
    """Conv 3×3 → BatchNorm → maximum over the channels → flatten → Dense.

    The Dense layer finds out by itself how many numbers are left of an image: 26 · 26.
    """

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """images: `[N, 28, 28, 1]` float. Returns the logits, `[N, 10]`."""
        nine, positions = within(9**-0.5), within(1 / 26)  # inputs of a unit: 3 · 3, and 26 · 26
        x = nn.Conv(32, (3, 3), padding="VALID", kernel_init=nine, bias_init=nine, name="conv")(images)
        x = BatchNorm(use_running_average=not train, **fields_from_torch(), name="bn")(x)
        x = largest(x)
        return nn.Dense(10, kernel_init=positions, bias_init=positions, name="fc")(x.reshape(len(x), -1))


def largest(x: jax.Array) -> jax.Array:
    """Returns the maximum over the last axis, whose gradient goes to one element, as that of `torch.max(x, 1)[0]` does.

    The gradient of `jnp.max` divides by the number of elements that equal the maximum. That number is 0, and the
    gradient NaN, where XLA computes x once more in another fusion and rounds it otherwise.
    """
    return jnp.take_along_axis(x, jnp.argmax(x, -1, keepdims=True), -1)[..., 0]


MODEL, OPTIMIZER = TorchNet(), optax.adam(1e-3, eps=1e-8)


@cache
def _blank() -> Any:
    return MODEL.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)), train=False)


def load(weights: Any) -> Any:
    """Returns the variables of the port for the state dict of the original."""
    return from_torch(weights, _blank())


save = to_torch
