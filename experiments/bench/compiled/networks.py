"""Defines networks to compare normalizations in, from one layer to ResNet-50; NHWC, with the norm as an argument."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

Norm = Callable[..., nn.Module]  # () -> a module that takes x


class Layer(nn.Module):
    """Computes ReLU(norm(x))."""

    norm: Norm

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.relu(self.norm()(x))


class MaskedLayer(nn.Module):
    """Computes ReLU(norm(x)) with a mask, under which one row in eight is padding."""

    norm: Norm

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        rows = jax.lax.broadcasted_iota(jnp.int32, (*x.shape[:-1], 1), 0)
        return nn.relu(self.norm()(x, mask=rows % 8 < 7))


class Bottleneck(nn.Module):
    """Residual block of conv 1×1, 3×3, 1×1, each with a norm: He et al. 2016, figure 5, with the stride in the 3×3."""

    norm: Norm
    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = partial(_conv, dtype=x.dtype)
        y = nn.relu(self.norm()(conv(self.features, 1)(x)))
        y = nn.relu(self.norm()(conv(self.features, 3, stride=self.stride)(y)))
        y = self.norm()(conv(4 * self.features, 1)(y))
        if x.shape != y.shape:
            x = self.norm()(conv(4 * self.features, 1, stride=self.stride)(x))
        return nn.relu(x + y)


class ResNet50(nn.Module):
    """ResNet-50 of He et al. 2016, https://arxiv.org/abs/1512.03385: 53 normalisations, 25.6 million parameters."""

    norm: Norm
    classes: int = 1000
    blocks: Sequence[int] = (3, 4, 6, 3)

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.relu(self.norm()(_conv(64, 7, images.dtype, stride=2)(images)))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, blocks in enumerate(self.blocks):
            for block in range(blocks):
                x = Bottleneck(self.norm, 64 * 2**stage, stride=2 if stage and not block else 1)(x)
        return nn.Dense(self.classes)(x.mean((1, 2)).astype(jnp.float32))


def _conv(features: int, size: int, dtype: Any, stride: int = 1) -> nn.Conv:
    """Builds a square convolution without bias."""
    return nn.Conv(features, (size, size), (stride, stride), use_bias=False, dtype=dtype)
