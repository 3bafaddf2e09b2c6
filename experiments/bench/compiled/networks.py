"""Defines networks to compare normalizations in, from one layer to ResNet-50; NHWC, with the norm as an argument."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

Norm = Callable[..., nn.Module]  # () -> a module that takes x
NnxNorm = Callable[[int], nnx.Module]  # features -> a module that takes x


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


class NnxBottleneck(nnx.Module):
    """Is `Bottleneck` for flax.nnx; `norm(features)` makes a layer."""

    def __init__(self, norm: NnxNorm, inputs: int, features: int, stride: int, dtype: Any, rngs: nnx.Rngs) -> None:
        conv = partial(_nnx_conv, dtype=dtype, rngs=rngs)
        outputs = 4 * features
        self.convs = nnx.List(
            [conv(inputs, features, 1), conv(features, features, 3, stride), conv(features, outputs, 1)]
        )
        self.norms = nnx.List([norm(features), norm(features), norm(outputs)])
        shortcut = stride != 1 or inputs != outputs
        self.shortcut = nnx.Sequential(conv(inputs, outputs, 1, stride), norm(outputs)) if shortcut else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(y))
            y = nnx.relu(y) if i < 2 else y
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class NnxResNet50(nnx.Module):
    """Is `ResNet50` for flax.nnx; `norm(features)` makes a layer."""

    def __init__(
        self,
        norm: NnxNorm,
        *,
        classes: int = 1000,
        blocks: Sequence[int] = (3, 4, 6, 3),
        dtype: Any = jnp.bfloat16,
        rngs: nnx.Rngs,
    ) -> None:
        self.first = nnx.Sequential(_nnx_conv(3, 64, 7, 2, dtype=dtype, rngs=rngs), norm(64), nnx.relu)
        inputs, made = 64, []
        for stage, count in enumerate(blocks):
            for block in range(count):
                features = 64 * 2**stage
                made.append(NnxBottleneck(norm, inputs, features, 2 if stage and not block else 1, dtype, rngs))
                inputs = 4 * features
        self.blocks = nnx.List(made)
        self.head = nnx.Linear(inputs, classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = nnx.max_pool(self.first(images), (3, 3), (2, 2), "SAME")
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)).astype(jnp.float32))


def _nnx_conv(inputs: int, outputs: int, size: int, stride: int = 1, *, dtype: Any, rngs: nnx.Rngs) -> nnx.Conv:
    """Builds a square convolution without bias."""
    return nnx.Conv(inputs, outputs, (size, size), (stride, stride), use_bias=False, dtype=dtype, rngs=rngs)
