"""Test error against the batch that is normalised over, 2 to 128, for six normalisations.

Claim:    BN loses accuracy where it normalises over few images, more the fewer; what does not depend on the batch
          (GroupNorm, LayerNorm) loses none, and Batch Renorm and moving-average BN lose less than BN.
Command:  python -m experiments.repro.wu2018                     # --smoke: seconds; --full: 10 epochs
Hardware: 2 CPU cores
Time:     8 min of one core

Wu & He 2018, https://arxiv.org/abs/1803.08494, figure 1 (ResNet-50, ImageNet, 2 to 32 images on each of 8 GPUs); Ioffe
2017, https://arxiv.org/abs/1702.03275; Yan et al. 2020, https://arxiv.org/abs/2001.06838. Every step has the gradient
of 128 images, gathered by `optax.MultiSteps` over as many parts as it takes, so that nothing differs but how many are
normalised together (there the gradient's batch and the learning rate grow in proportion). Running averages reach back
over the same number of images whatever the part. Ghost BN normalises the same images together as BN does, but its
running averages are those of all 128. Fashion-MNIST, 25,600 images once.
"""

from collections.abc import Iterator
from functools import partial

import jax
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure

from bnjax.linen import BatchNorm, BatchRenorm, GhostBatchNorm, MovingAverageBatchNorm
from experiments.models.convolutional import Norm, StridedNet
from experiments.repro import study
from experiments.repro.claims import Claim, Measure, of

GRADIENT = 128  # images in each step of the optimizer
PARTS = (2, 4, 8, 32, GRADIENT)  # images that are normalised together
BY_BATCH, BY_IMAGE = ("BN", "Ghost BN", "Batch Renorm", "moving-average BN"), ("GroupNorm", "LayerNorm")
SETTINGS = {
    f"{norm}, {part}": (norm, part) for norm in BY_BATCH for part in PARTS if norm != "Ghost BN" or part < GRADIENT
}
SETTINGS |= {norm: (norm, GRADIENT) for norm in BY_IMAGE}


class PerImage(nn.Module):
    """Applies GroupNorm with the interface of a batch normalization; it computes the same in both modes."""

    use_running_average: bool
    groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.GroupNorm(self.groups)(x)


def norm_of(name: str, part: int, parts: int) -> Norm:
    """Builds the normalization called `name`, over `part` images; `parts` is the number of training steps it sees."""
    momentum = 0.9 ** (part / GRADIENT)
    limits = {k: optax.linear_schedule(a, b, parts // 2, parts // 10) for k, a, b in (("r_max", 1, 3), ("d_max", 0, 5))}
    return {
        "BN": partial(BatchNorm, momentum=momentum),
        "Ghost BN": partial(GhostBatchNorm, virtual_batch_size=part, momentum=0.9),
        "Batch Renorm": partial(BatchRenorm, momentum=momentum, **limits),
        "moving-average BN": partial(MovingAverageBatchNorm, momentum=momentum),
        "GroupNorm": partial(PerImage, groups=4),
        "LayerNorm": partial(PerImage, groups=1),  # over channels and positions of an image, as Wu & He do
    }[name]


def centred_kernels() -> optax.GradientTransformation:
    """Keeps the mean of each kernel at zero per output channel: moving-average BN divides but subtracts no mean."""

    def centre(update: jax.Array, param: jax.Array) -> jax.Array:
        return update - (param + update).mean((0, 1, 2)) if param.ndim == 4 else update

    return optax.stateless(lambda updates, params: jax.tree.map(centre, updates, params))


def trial(setting: str, seed: int, config: study.Config) -> Iterator[study.Line]:
    """Trains one setting, and yields the test accuracy after the same number of images."""
    norm, normalised = SETTINGS[setting]
    part = GRADIENT if norm == "Ghost BN" else normalised
    updates, many = config.pick(200, 2, full=4_690), GRADIENT // part
    optimizer = optax.sgd(optax.cosine_decay_schedule(0.05, updates), momentum=0.9)
    if norm == "moving-average BN":
        optimizer = optax.chain(optimizer, centred_kernels())
    model = StridedNet(norm_of(norm, normalised, updates * many), config.pick((8, 16, 32, 64), (4, 4)))
    options = dict(steps=updates * many, every=updates * many, batch_size=part, seed=seed)
    for _, line in study.train(model, optax.MultiSteps(optimizer, many), study.pictures(config), **options):
        yield line


def errors(lines: list[study.Line], norm: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the parts `[P]` and the test error in % `[seeds, P]`; norms without a part ran once, with all."""
    parts = [part for part in PARTS if f"{norm}, {part}" in SETTINGS] or [GRADIENT]
    settings = [norm if norm in SETTINGS else f"{norm}, {part}" for part in parts]
    columns = [study.curves(lines, setting, "step", "accuracy")[1][:, -1] for setting in settings]
    return np.array(parts), 100 * (1 - np.stack(columns, 1))


def table(lines: list[study.Line]) -> str:
    """Makes a table of test errors in %, and of what normalizing over 2 images costs."""
    text = [f"| test error, % | {' | '.join(f'of {part}' for part in PARTS)} | of 2, over BN of {GRADIENT} |"]
    text.append("|---" * (len(PARTS) + 2) + "|")
    best = errors(lines, "BN")[1][:, -1]
    for norm in (*BY_BATCH, *BY_IMAGE):
        parts, found = errors(lines, norm)
        cells = {part: study.spread(column, 2) for part, column in zip(parts, found.T, strict=True)}
        row = [cells.get(part, "is BN" if norm in BY_BATCH else "as of 128") for part in PARTS]
        text.append(f"| {norm} | {' | '.join(row)} | {study.spread(found[:, 0] - best, 2)} |")
    return "\n".join(text)


def draw(lines: list[study.Line], figure: Figure) -> None:
    """Draws the paper's figure: test error by images normalized together, mean and standard deviation over seeds."""
    axes = figure.subplots()
    for norm, marker in zip((*BY_BATCH, *BY_IMAGE), "osD^xv", strict=True):
        parts, found = errors(lines, norm)
        axes.errorbar(parts, found.mean(0), study.deviation(found), marker=marker, capsize=3, label=norm)
    axes.set_xscale("log", base=2)
    axes.set_xticks(PARTS, [str(part) for part in PARTS])
    axes.set(xlabel="images normalised together (each step: the gradient of 128)", ylabel="test error, %")
    figure.legend(loc="outside right upper")


def error(setting: str) -> Measure:
    """Returns a measure: the test error at the end in %."""
    return of(setting, "accuracy", lambda values: 100 * (1 - values[-1]))


CLAIMS = (
    Claim("BN of 2 images errs more than BN of 128", error("BN, 2"), ">", error(f"BN, {GRADIENT}")),
    Claim("GroupNorm errs less than BN of 2", error("GroupNorm"), "<", error("BN, 2")),
    Claim("Batch Renorm of 2 errs less than BN of 2", error("Batch Renorm, 2"), "<", error("BN, 2")),
    Claim("Moving-average BN of 2 errs less than BN of 2", error("moving-average BN, 2"), "<", error("BN, 2")),
)
DISTANCE = (
    "a CNN of four layers on 25,600 Fashion-MNIST images instead of ResNet-50 on ImageNet; the optimizer's batch "
    "stays 128."
)
STUDY = study.Study("wu2018", tuple(SETTINGS), trial, table, draw, size=(8, 4.5), claims=CLAIMS, distance=DISTANCE)

if __name__ == "__main__":
    study.run(STUDY, __doc__)
