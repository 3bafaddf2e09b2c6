"""Defines residual networks of bottlenecks, ResNet-50 and smaller, with their normalization as an argument."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

Norm = Callable[..., nn.Module]
BLOCKS = {"resnet26": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}


class Bottleneck(nn.Module):
    """Conv 1×1, 3×3, 1×1, each with a norm, beside a shortcut: He et al. 2016, figure 5, with the stride in the 3×3.

    With `zero_scale` the last norm begins with a scale of zero, and the block as its shortcut: Goyal et al. 2017,
    https://arxiv.org/abs/1706.02677, section 5.1.
    """

    norm: Norm
    width: int
    stride: int = 1
    zero_scale: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)
        last = {"scale_init": nn.initializers.zeros} if self.zero_scale else {}
        y = nn.relu(self.norm()(conv(self.width, (1, 1))(x)))
        y = nn.relu(self.norm()(conv(self.width, (3, 3), self.stride)(y)))
        y = self.norm(**last)(conv(4 * self.width, (1, 1))(y))
        if x.shape != y.shape:
            x = self.norm()(conv(4 * self.width, (1, 1), self.stride)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet of He et al. 2016, https://arxiv.org/abs/1512.03385, table 1; at width 64 and with 1,000 classes ResNet-50
    has 25.6 million parameters.

    `norm(use_running_average=...)` builds each normalization, and `dtype` is that of the activations.
    """

    norm: Norm
    width: int = 64
    classes: int = 1000
    blocks: Sequence[int] = BLOCKS["resnet50"]
    zero_scale: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Computes logits `[N, classes]`, float32, from float images `[N, H, W, 3]`."""
        norm = partial(self.norm, use_running_average=not train)
        x = nn.Conv(self.width, (7, 7), 2, use_bias=False, dtype=self.dtype)(images)
        x = nn.max_pool(nn.relu(norm()(x)), (3, 3), (2, 2), "SAME")
        for stage, blocks in enumerate(self.blocks):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                x = Bottleneck(norm, self.width * 2**stage, stride, self.zero_scale, self.dtype)(x)
        return nn.Dense(self.classes)(x.mean((1, 2), dtype=jnp.float32))
