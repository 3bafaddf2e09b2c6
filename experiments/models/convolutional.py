"""Defines the image networks that take their normalization as an argument: plain ones, and ResNet-20."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

Norm = Callable[..., nn.Module]


class ConvNet(nn.Module):
    """Blocks of Conv 3×3 → norm → ReLU → max-pool 2×2, then one Dense layer that gives the logits.

    `norm(use_running_average=...)` builds the normalization of each block: a class or a `functools.partial` of one. The
    convolutions have no bias, because the normalization would subtract it again. `dtype` is that of the activations.
    """

    norm: Norm
    widths: Sequence[int] = (16, 32, 64)
    classes: int = 10
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Computes logits `[N, classes]` from float images `[N, H, W, C]`."""
        x = images
        for width in self.widths:
            x = nn.Conv(width, (3, 3), use_bias=False, dtype=self.dtype)(x)
            x = self.norm(use_running_average=not train)(x)
            x = max_pool(nn.relu(x))
        return nn.Dense(self.classes, dtype=self.dtype)(x.reshape(x.shape[0], -1))


class StridedNet(nn.Module):
    """Blocks of Conv 3×3 with stride 2 → norm → ReLU, and a Dense layer that gives the logits.

    Cheaper than `ConvNet`. Its last blocks have few positions, so that statistics over few images are statistics over
    few values, as in the last stage of a ResNet.
    """

    norm: Norm
    widths: Sequence[int] = (8, 16, 32, 64)
    classes: int = 10

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Computes logits `[N, classes]` from float images `[N, H, W, C]`."""
        x = images
        for width in self.widths:
            x = nn.Conv(width, (3, 3), strides=2, use_bias=False)(x)
            x = nn.relu(self.norm(use_running_average=not train)(x))
        return nn.Dense(self.classes)(x.reshape(x.shape[0], -1))


class Unnormalised(nn.Module):
    """Returns x unchanged: stands in for a normalization in networks that have none."""

    use_running_average: bool | None = None

    def __call__(self, x: jax.Array, use_running_average: bool | None = None) -> jax.Array:
        return x


class ResNet20(nn.Module):
    """ResNet-20 for small images, of He et al. 2016, section 4.2: a convolution, three stages of three blocks, Dense.

    `norm(use_running_average=...)` builds each normalization, and `dtype` is that of the activations. 0.27 million
    parameters at the paper's widths. Source: https://arxiv.org/abs/1512.03385
    """

    norm: Norm
    widths: Sequence[int] = (16, 32, 64)
    classes: int = 10
    dtype: Any = None
    blocks: int = 3

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Computes logits `[N, classes]` from float images `[N, H, W, C]`."""
        norm = partial(self.norm, use_running_average=not train)
        conv = partial(nn.Conv, kernel_size=(3, 3), use_bias=False, dtype=self.dtype)
        x = nn.relu(norm()(conv(self.widths[0])(images)))
        for stage, width in enumerate(self.widths):
            for block in range(self.blocks):
                stride = 2 if stage and not block else 1
                y = nn.relu(norm()(conv(width, strides=stride)(x)))
                y = norm()(conv(width)(y))
                x = nn.relu(y + shortcut(x, width, stride))
        return nn.Dense(self.classes, dtype=self.dtype)(x.mean((1, 2)))


def shortcut(x: jax.Array, width: int, stride: int) -> jax.Array:
    """Applies the paper's option A: subsamples positions by `stride` and pads with zero channels up to `width`."""
    x = x[:, ::stride, ::stride]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[-1])))


def max_pool(x: jax.Array) -> jax.Array:
    """Takes the maximum of each 2×2 window; an odd last row or column is left out, as `nn.max_pool` does.

    It is a reshape and two pairwise maxima, because the gradient of `nn.max_pool` is a select-and-scatter that makes a
    whole training step 1.4 times slower on the CPU. The gradient of `x.max(axis)` is not safe: it divides by the number
    of elements equal to the maximum, and where XLA recomputes x with another rounding, that number is 0 and the
    gradient NaN (`jax_disable_most_optimizations` shows it). Tied maxima share the gradient here; `nn.max_pool` gives
    it to the first.
    """
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2].reshape(batch, height // 2, 2, width // 2, 2, channels)
    x = jnp.maximum(x[:, :, 0], x[:, :, 1])
    return jnp.maximum(x[:, :, :, 0], x[:, :, :, 1])
