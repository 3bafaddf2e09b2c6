"""The article's PyTorch program: the original of `experiments.article.torch_port`. Needs PyTorch.

The article's text is not at hand: this is the program of its description, a CNN for MNIST whose first Linear has a
wrong in_features, as such articles print it. The usual mistake, 7 · 7 positions, is that of convolutions that pad;
these do not, and 28 → 26 → 13 → 11 → 5 positions are left.
"""

from collections.abc import Sequence

import torch
from torch import nn

POOLED, AS_PRINTED = 5, 7


class CNN(nn.Module):
    """Conv → BN → ReLU → pooling, twice; Linear → ReLU; Linear."""

    def __init__(self, widths: Sequence[int] = (32, 64), units: int = 128, pooled: int = POOLED):
        super().__init__()
        self.conv1 = nn.Conv2d(1, widths[0], kernel_size=3)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.conv2 = nn.Conv2d(widths[0], widths[1], kernel_size=3)
        self.bn2 = nn.BatchNorm2d(widths[1])
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1 = nn.Linear(widths[1] * pooled * pooled, units)
        self.fc2 = nn.Linear(units, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: `[N, 1, 28, 28]` between 0 and 1. Returns the logits, `[N, 10]`."""
        x = self.pool(torch.relu(self.bn1(self.conv1(x))))
        x = self.pool(torch.relu(self.bn2(self.conv2(x))))
        x = torch.flatten(x, 1)
        return self.fc2(torch.relu(self.fc1(x)))


def training(model: CNN) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The loss and the optimizer."""
    return nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters(), lr=0.001)
