"""ResNet-20 on Fashion-MNIST: `experiments.train` with other defaults, so with all of its options.

Claim:    ResNet-20 with BN learns Fashion-MNIST on two CPU cores: no reproduction of the paper's error on CIFAR-10.
Command:  python -m experiments.repro.he2016                     # --full: 15 epochs; --smoke: seconds, on the digits
Hardware: 2 CPU cores
Time:     13 min, --full 48 min, at 315 images/s (results/he2016.md)

He, Zhang, Ren & Sun 2016, https://arxiv.org/abs/1512.03385, section 4.2: 20 layers, batches of 128, images that move by
up to four pixels and are mirrored; there CIFAR-10 and SGD, here AdamW, another data set, and one seed. 160 epochs
of CIFAR-10's 50,000 images would take 7 hours at 315 images/s, five seeds 35 hours. With CIFAR-10's binary files and
whatever a larger machine has:

    python -m experiments.repro.he2016 --full --data cifar-10 --data-dir cifar-10-batches-bin
    python -m experiments.repro.he2016 --full --precision bfloat16 --accumulate 2 --devices 8 --resume
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from experiments.train import __main__ as train
from experiments.train.config import Config, Training

USUAL = Training(
    data="fashion-mnist", model="resnet20", epochs=4, batch_size=128, lr=5e-3, weight_decay=0.05, max_shift=2, flip=True
)
SIZES = {
    "--smoke": replace(USUAL, data="mnist-5k", epochs=1, width=4, max_shift=0),
    "--full": replace(USUAL, epochs=15),
}
RUNS = Path("runs/resnet20")


def defaults(options: Sequence[str]) -> Config:
    """Returns the default options for the size (--smoke, --full or neither) that is among `options`."""
    size = next((size for size in SIZES if size in options), None)
    blank = Config()
    return replace(blank, training=SIZES.get(size, USUAL), files=replace(blank.files, runs=RUNS))


def main(argv: Sequence[str]) -> int:
    """Trains, and returns the exit status."""
    options = [option for option in argv if option not in SIZES]
    return train.main(options, default=defaults(argv), prog=f"python -m {__spec__.name}", description=__doc__)


if __name__ == "__main__":
    train.leave(main(sys.argv[1:]))
