"""Builds `experiments.models.convolutional.ResNet20` in flax.nnx and in PyTorch, with the same parameters.

Layers have the names that flax.linen gives them (Conv_0, BatchNorm_0, ..., Dense_0), so that one set of parameters fits
all.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments.bench.clock.peers import import_torch
from experiments.models.convolutional import shortcut

WIDTHS, CHANNELS, CLASSES = (16, 32, 64), 3, 10


def convolutions(blocks: int) -> Iterator[tuple[int, int, int]]:
    """Yields input channels, output channels and stride of each convolution; a normalization follows each."""
    before = WIDTHS[0]
    yield CHANNELS, before, 1
    for stage, width in enumerate(WIDTHS):
        for block in range(blocks):
            yield before, width, 2 if stage and not block else 1
            yield width, width, 1
            before = width


def forward(net: Any, x: Any, relu: Callable[[Any], Any], skip: Callable[[Any, int, int], Any], rows: Any) -> Any:
    """Computes the logits, in flax.nnx or PyTorch."""
    plan = list(convolutions(net.blocks))

    def layer(i: int, x: Any) -> Any:
        return getattr(net, f"BatchNorm_{i}")(getattr(net, f"Conv_{i}")(x))

    x = relu(layer(0, x))
    for i in range(1, len(plan), 2):
        _, width, stride = plan[i]
        x = relu(layer(i + 1, relu(layer(i, x))) + skip(x, width, stride))
    return net.Dense_0(x.mean(rows))


class ResNet20(nnx.Module):
    """ResNet-20 in flax.nnx; `norm(features, rngs=...)` builds each normalization."""

    def __init__(self, norm: Callable[..., nnx.Module], *, dtype: Any = None, blocks: int = 3, rngs: nnx.Rngs):
        self.blocks = blocks
        conv = partial(nnx.Conv, kernel_size=(3, 3), use_bias=False, dtype=dtype, rngs=rngs)
        for i, (before, width, stride) in enumerate(convolutions(blocks)):
            setattr(self, f"Conv_{i}", conv(before, width, strides=stride))
            setattr(self, f"BatchNorm_{i}", norm(width, rngs=rngs))
        self.Dense_0 = nnx.Linear(WIDTHS[-1], CLASSES, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Computes logits `[N, 10]` from images `[N, H, W, 3]`."""
        return forward(self, images, nnx.relu, shortcut, (1, 2))


def torch_resnet20(params: Any, blocks: int = 3) -> Any:
    """Builds the network in PyTorch, channels first, with the parameters and the dtype of a flax.linen network."""
    torch = import_torch()

    class Net(torch.nn.Module):
        def forward(self, images: Any) -> Any:
            return forward(self, images, torch.relu, _torch_shortcut, (2, 3))

    net = Net()
    net.blocks = blocks
    for i, (before, width, stride) in enumerate(convolutions(blocks)):
        setattr(net, f"Conv_{i}", _torch_convolution(before, width, stride))
        setattr(net, f"BatchNorm_{i}", torch.nn.BatchNorm2d(width, momentum=0.01))
    net.Dense_0 = torch.nn.Linear(WIDTHS[-1], CLASSES)
    net.to(torch.from_numpy(np.array(params["Dense_0"]["bias"])).dtype)
    with torch.no_grad():
        for name, value in net.named_parameters():
            value.copy_(torch.from_numpy(_torch_parameter(params, name)))
    return net


def _torch_convolution(before: int, width: int, stride: int) -> Any:
    """Builds a convolution with Flax's "SAME" padding, which at stride 2 and even size pads only at the end."""
    torch = import_torch()
    conv = partial(torch.nn.Conv2d, before, width, 3, stride, bias=False)
    return conv(padding=1) if stride == 1 else torch.nn.Sequential(torch.nn.ZeroPad2d((0, 1, 0, 1)), conv())


def _torch_shortcut(x: Any, width: int, stride: int) -> Any:
    """Applies `shortcut` to a PyTorch tensor, channels first."""
    torch = import_torch()
    x = x[:, :, ::stride, ::stride]
    return torch.nn.functional.pad(x, (0, 0, 0, 0, 0, width - x.shape[1]))


def _torch_parameter(params: Any, name: str) -> np.ndarray:
    """Returns a parameter of Flax in PyTorch's layout, by PyTorch's name such as Conv_3.weight or Conv_7.1.weight."""
    layer, *_, kind = name.split(".")
    found = params[layer]
    if kind == "bias" or "scale" in found:
        return np.array(found["bias" if kind == "bias" else "scale"])
    kernel = np.array(found["kernel"])
    return np.ascontiguousarray(kernel.T if kernel.ndim == 2 else np.transpose(kernel, (3, 2, 0, 1)))
