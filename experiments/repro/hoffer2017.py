"""Large batches and many devices: local, grouped and global statistics, ghost batches, a higher rate, longer training.

Claim:    A large batch generalises worse; a higher rate, ghost batches and as many steps as the small batch had make up
          for most of it. Devices matter only by how many images are normalised together: global statistics on 8
          devices give the curve of one device, local ones that of ghost batches.
Command:  python -m experiments.repro.hoffer2017                 # --smoke: seconds; --full: all 60,000 images
Hardware: 2 CPU cores, which simulate 8 devices
Time:     5 min of one core

Hoffer, Hubara & Soudry 2017, https://arxiv.org/abs/1705.08741, table 1 (MNIST, a fully connected network, batches of
4,096, ghost batches of 128); Wu & Johnson 2021, https://arxiv.org/abs/2105.07576, section 4. Here Fashion-MNIST, 5,000
images 16 times, four layers of 128, batches of 64 and of 512, the higher rate √8 times the other. Under plain jit
statistics are global, and those of groups of devices are GhostBatchNorm's. Training amplifies rounding, which depends
on the number of devices: curves that ought to be the same part slowly.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure

from bnjax.linen import BatchNorm, GhostBatchNorm
from experiments.data.images import Labelled, Splits
from experiments.models.convolutional import Norm
from experiments.repro import study
from experiments.repro.claims import Claim, Measure, of
from experiments.train.devices import DATA
from experiments.train.loop import Partition

SMALL, LARGE, RATE, EPOCHS, LINES = 64, 512, 0.02, 16, 10
HIGHER = RATE * (LARGE / SMALL) ** 0.5


class Setting(NamedTuple):
    """Options of one training; by default a large batch with the higher learning rate."""

    norm: Norm
    devices: int = 1
    partition: Partition = "shard_map"
    batch: int = LARGE
    rate: float = HIGHER
    passes: int = 1  # times the usual number of epochs


BN, GHOST = partial(BatchNorm, momentum=0.9), partial(GhostBatchNorm, momentum=0.9)
GHOST_64 = partial(GHOST, virtual_batch_size=SMALL, axis_name=DATA)
GLOBAL, LOCAL = partial(BN, axis_name=DATA), partial(BN, stats_axis_name=DATA)  # normalize by all devices, by each
PAPER = {
    "small batch": Setting(GLOBAL, batch=SMALL, rate=RATE),
    "large batch": Setting(GLOBAL, rate=RATE),
    "+ higher rate": Setting(GLOBAL),
    "+ ghost batches": Setting(GHOST_64),
    "+ as many steps": Setting(GHOST_64, passes=LARGE // SMALL),
}
DEVICES = {
    "global, 8 devices": Setting(GLOBAL, devices=8),
    "global, 8 devices, plain jit": Setting(BN, devices=8, partition="jit"),
    "local, 2 devices": Setting(LOCAL, devices=2),
    "in fours of 8 devices": Setting(partial(GHOST, virtual_batch_size=256), devices=8, partition="jit"),
    "local, 4 devices": Setting(LOCAL, devices=4),
    "in twos of 8 devices": Setting(partial(GHOST, virtual_batch_size=128), devices=8, partition="jit"),
    "local, 8 devices": Setting(LOCAL, devices=8),
}
SETTINGS = PAPER | DEVICES
# Settings that normalize the same images together as another one, and how many images.
SAME = {
    "global, 8 devices": ("+ higher rate", 512),
    "global, 8 devices, plain jit": ("+ higher rate", 512),
    "in fours of 8 devices": ("local, 2 devices", 256),
    "in twos of 8 devices": ("local, 4 devices", 128),
    "local, 8 devices": ("+ ghost batches", 64),
}


class FullyConnected(nn.Module):
    """Four times Dense 128 → norm → ReLU, and a Dense layer for the logits."""

    norm: Norm

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Computes logits `[N, 10]` from float images `[N, 28, 28, 1]`."""
        x = images.reshape(len(images), -1)
        for _ in range(4):
            x = nn.relu(self.norm(use_running_average=not train)(nn.Dense(128, use_bias=False)(x)))
        return nn.Dense(10)(x)


def trial(setting: str, seed: int, config: study.Config) -> Iterator[study.Line]:
    """Trains one setting, and yields loss and test accuracy at equal fractions of the training."""
    norm, devices, partition, batch, rate, passes = SETTINGS[setting]
    data = study.pictures(config)
    train = Labelled(*(part[: config.pick(5_000, 1_000, full=60_000)] for part in data.train))
    test = Labelled(*(part[: config.pick(5_000, 500, full=10_000)] for part in data.test))
    steps = passes * config.pick(EPOCHS, 1, full=EPOCHS) * len(train.labels) // batch
    optimizer = optax.sgd(optax.cosine_decay_schedule(rate, steps), momentum=0.9)
    options = dict(steps=steps, every=-(-steps // LINES), batch_size=batch, seed=seed)
    options |= dict(devices=devices, partition=partition)
    for _, line in study.train(FullyConnected(norm), optimizer, Splits(train, test), **options):
        yield line | {"share": line["step"] / steps}


def error(lines: list[study.Line], setting: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the fractions of the training `[T]`, and the test error in % of every seed `[seeds, T]`."""
    share, accuracy = study.curves(lines, setting, "share", "accuracy")
    return share, 100 * (1 - accuracy)


def apart(lines: list[study.Line], setting: str, other: str, name: str) -> np.ndarray:
    """Returns the largest difference over seeds between the curves of two settings, `[T]`."""
    one, two = (study.curves(lines, which, "step", name)[1] for which in (setting, other))
    return np.abs(one - two).max(0)


def table(lines: list[study.Line]) -> str:
    """Makes two tables: the paper's, and the differences between curves that should be equal."""
    text = ["| | test error, % | training accuracy, % |", "|---|---|---|"]
    for setting in SETTINGS:
        accuracy = 100 * study.curves(lines, setting, "step", "train_accuracy")[1][:, -1]
        row = [study.spread(error(lines, setting)[1][:, -1], 2), study.spread(accuracy, 2)]
        text.append(f"| {setting} | {' | '.join(row)} |")
    text += [
        "",
        "| the same images together | | largest difference of loss, first tenth | all steps | of test error, % |",
    ]
    text.append("|---" * 5 + "|")
    for setting, (other, images) in SAME.items():
        loss, accuracy = (apart(lines, setting, other, name) for name in ("loss", "accuracy"))
        cells = f"{loss[0]:.1e} | {loss.max():.1e} | {100 * accuracy.max():.2f}"
        text.append(f"| {images} | {setting}, against {other} | {cells} |")
    return "\n".join(text)


def draw(lines: list[study.Line], figure: Figure) -> None:
    """Draws the paper's settings, equal settings on many and on few devices, and error by images normalized
    together.
    """
    paper, same, by_images = figure.subplots(1, 3)
    for setting in PAPER:
        study.band(paper, *error(lines, setting), label=setting)
    few = {images: other for other, images in SAME.values()}
    colors = {images: f"C{i}" for i, images in enumerate(few)}
    for images, setting in few.items():
        same.plot(*first(lines, setting), color=colors[images], label=f"{images} together, {setting}")
    for setting, (_, images) in SAME.items():
        marker = "+" if setting.endswith("jit") else "o"
        same.plot(*first(lines, setting), marker, color=colors[images], mfc="none")
    same.plot([], [], "ok", mfc="none", label="the same on 8 devices")
    same.plot([], [], "+k", label="on 8 devices, plain jit")
    sizes = sorted(few)
    finals = np.stack([error(lines, few[images])[1][:, -1] for images in sizes], 1)
    study.band(by_images, np.array(sizes), finals, label="", marker="o")
    label = dict(xlabel="share of the training")
    paper.set(**label, ylabel="test error, %", yscale="log", title="batches of 64 and of 512")
    same.set(**label, ylabel="training loss (first seed)", yscale="log", title="the same images together")
    by_images.set(xlabel="of 512 images, normalised together", ylabel="test error, %", title="from local to global")
    by_images.set_xscale("log", base=2)
    by_images.set_xticks(sizes, [str(images) for images in sizes])
    for axes, ticks in ((paper, (15, 20, 25, 30, 40, 60, 80)), (same, (0.1, 0.2, 0.5, 1, 2))):
        low, high = axes.get_ylim()
        axes.set_yticks([tick for tick in ticks if low <= tick <= high])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
        study.below(axes)


def first(lines: list[study.Line], setting: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the fractions of the training and the loss of the first seed."""
    share, loss = study.curves(lines, setting, "share", "loss")
    return share, loss[0]


def test_error(setting: str) -> Measure:
    """Returns a measure: the test error at the end in %."""
    return of(setting, "accuracy", lambda values: 100 * (1 - values[-1]))


SMALL_BATCH, LARGE_BATCH, HIGH, GHOSTS, LONG = map(test_error, PAPER)
CLAIMS = (
    Claim("The large batch errs more than the small one", LARGE_BATCH, ">", SMALL_BATCH),
    Claim("A higher rate mends some of it", HIGH, "<", LARGE_BATCH),
    Claim("Ghost batches mend more", GHOSTS, "<", HIGH),
    Claim("As many steps as the small batch mend more", LONG, "<", GHOSTS),
    Claim("With all three the large batch errs as the small one", LONG, "=", SMALL_BATCH, 0.5),
    Claim("Global statistics on 8 devices err as one device", test_error("global, 8 devices"), "=", HIGH, 0.5),
    Claim("Local statistics on 8 devices err as ghost batches", test_error("local, 8 devices"), "=", GHOSTS, 0.5),
)
DISTANCE = (
    "Fashion-MNIST instead of MNIST, batches of 512 instead of 4,096, 5,000 images; no clipped gradient and no "
    "noise in it."
)
STUDY = study.Study(
    "hoffer2017", tuple(SETTINGS), trial, table, draw, devices=8, size=(14, 5.5), claims=CLAIMS, distance=DISTANCE
)

if __name__ == "__main__":
    study.run(STUDY, __doc__)
