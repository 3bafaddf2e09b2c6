"""The article's network: Conv → normalisation → ReLU blocks, pooling, and a Dense softmax head."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import linen as nn

Norm = Callable[..., nn.Module]


class ConvNet(nn.Module):
    """Blocks of Conv 3×3 → norm → ReLU → max-pool 2×2, then one Dense layer that gives the logits.

    `norm(use_running_average=...)` builds the normalisation of each block: a class or a `functools.partial` of one. The
    convolutions have no bias, which the normalisation would take away again. `dtype` is that of the activations.
    """

    norm: Norm
    widths: Sequence[int] = (16, 32, 64)
    classes: int = 10
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """images: `[N, H, W, C]` float. Returns the logits, `[N, classes]`."""
        x = images
        for width in self.widths:
            x = nn.Conv(width, (3, 3), use_bias=False, dtype=self.dtype)(x)
            x = self.norm(use_running_average=not train)(x)
            x = max_pool(nn.relu(x))
        return nn.Dense(self.classes, dtype=self.dtype)(x.reshape(len(x), -1))


class Unnormalised(nn.Module):
    """In the place of a norm: x as it is."""

    use_running_average: bool | None = None

    def __call__(self, x: jax.Array, use_running_average: bool | None = None) -> jax.Array:
        return x


def max_pool(x: jax.Array) -> jax.Array:
    """The maximum of each 2×2 window; an odd last row or column is left out, as `nn.max_pool` does.

    A reshape and a maximum: the gradient of `nn.max_pool` is a select-and-scatter, which makes a whole training step
    1.4 times slower on the CPU. Tied maxima share the gradient here, where `nn.max_pool` gives it to the first.
    """
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))
