"""`experiments.models.convolutional.ResNet20` once more, in flax.nnx and in PyTorch, with the same parameters.

Layers have the names that flax.linen gives them there (Conv_0, BatchNorm_0, ..., Dense_0), so the parameters of one are
those of all.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments.models.convolutional import shortcut

WIDTHS, CHANNELS, CLASSES = (16, 32, 64), 3, 10


def convolutions(blocks: int) -> Iterator[tuple[int, int, int]]:
    """Features in and out and the stride of each convolution, with so many blocks a stage; a norm follows each."""
    before = WIDTHS[0]
    yield CHANNELS, before, 1
    for stage, width in enumerate(WIDTHS):
        for block in range(blocks):
            yield before, width, 2 if stage and not block else 1
            yield width, width, 1
            before = width


def forward(net: Any, x: Any, relu: Callable[[Any], Any], skip: Callable[[Any, int, int], Any], rows: Any) -> Any:
    """The logits, in either library."""
    plan = list(convolutions(net.blocks))

    def layer(i: int, x: Any) -> Any:
        return getattr(net, f"BatchNorm_{i}")(getattr(net, f"Conv_{i}")(x))

    x = relu(layer(0, x))
    for i in range(1, len(plan), 2):
        _, width, stride = plan[i]
        x = relu(layer(i + 1, relu(layer(i, x))) + skip(x, width, stride))
    return net.Dense_0(x.mean(rows))


class ResNet20(nnx.Module):
    """In flax.nnx: `norm(features, rngs=...)` builds each normalisation."""

    def __init__(self, norm: Callable[..., nnx.Module], *, dtype: Any = None, blocks: int = 3, rngs: nnx.Rngs):
        self.blocks = blocks
        conv = partial(nnx.Conv, kernel_size=(3, 3), use_bias=False, dtype=dtype, rngs=rngs)
        for i, (before, width, stride) in enumerate(convolutions(blocks)):
            setattr(self, f"Conv_{i}", conv(before, width, strides=stride))
            setattr(self, f"BatchNorm_{i}", norm(width, rngs=rngs))
        self.Dense_0 = nnx.Linear(WIDTHS[-1], CLASSES, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """images: `[N, H, W, 3]`. Returns the logits, `[N, 10]`."""
        return forward(self, images, nnx.relu, shortcut, (1, 2))


def torch_resnet20(params: Any, blocks: int = 3) -> Any:
    """In PyTorch, channels first, with the parameters of a flax.linen network; in their dtype."""
    import torch

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
    """With Flax's padding "SAME", which at stride 2 and an even size pads at the end alone."""
    import torch

    conv = partial(torch.nn.Conv2d, before, width, 3, stride, bias=False)
    return conv(padding=1) if stride == 1 else torch.nn.Sequential(torch.nn.ZeroPad2d((0, 1, 0, 1)), conv())


def _torch_shortcut(x: Any, width: int, stride: int) -> Any:
    import torch

    x = x[:, :, ::stride, ::stride]
    return torch.nn.functional.pad(x, (0, 0, 0, 0, 0, width - x.shape[1]))


def _torch_parameter(params: Any, name: str) -> np.ndarray:
    """Of Flax, in PyTorch's layout, by PyTorch's name, such as Conv_3.weight or Conv_7.1.weight."""
    layer, *_, kind = name.split(".")
    found = params[layer]
    if kind == "bias" or "scale" in found:
        return np.array(found["bias" if kind == "bias" else "scale"])
    kernel = np.array(found["kernel"])
    return np.ascontiguousarray(kernel.T if kernel.ndim == 2 else np.transpose(kernel, (3, 2, 0, 1)))
