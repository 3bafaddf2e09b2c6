"""Networks trained with 2 to 16 images per batch, evaluated by running averages with some of each image beside them.

Claim:    A network that was trained with few images per batch errs less where each image has a part in the statistics
          that normalise it, 1/n as in a training batch of n, than by running or recalibrated statistics alone.
Command:  python -m experiments.gallery.few_images              # --smoke: seconds, on digits
Hardware: 1 CPU core
Time:     4 min of one core

Summers & Dinneen 2020, https://arxiv.org/abs/1906.03548 (inference example weighing), and Singh & Shrivastava 2019,
https://arxiv.org/abs/1904.06031 (EvalNorm, which also estimates the weights; its abstract has 6.18 points on ImageNet
for batches of 2): `bnjax.tools.weigh_examples`. Every step has the gradient of 128 images, gathered over parts of n,
and running averages reach back over the same number of images whatever n is, as in `experiments.repro.wu2018`.
Fashion-MNIST, 25,600 images once; 4,800 test images.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from bnjax import tools
from bnjax.linen import BatchNorm
from experiments.gallery import RESULTS
from experiments.models.convolutional import StridedNet
from experiments.repro import study
from experiments.repro.claims import Claim, Measure

GRADIENT = 128  # images in each step of the optimizer
SETTINGS = {f"trained with {n} images per batch": n for n in (2, 4, 16)}
WEIGHTS = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)  # of an image in the statistics; 0: running averages alone
RECALIBRATED, TRAINING = "recalibrated", "batches of n"


def trial(setting: str, seed: int, config: study.Config) -> Iterator[study.Line]:
    """Trains once; yields the test error by the weight of an image, recalibrated, and in batches as in training."""
    n, data = SETTINGS[setting], study.pictures(config)
    model = StridedNet(partial(BatchNorm, momentum=0.9 ** (n / GRADIENT)), config.pick((8, 16, 32, 64), (4, 4)))
    updates, many, images = config.pick(200, 2), GRADIENT // n, config.pick(4_800, 80)
    optimizer = optax.MultiSteps(optax.sgd(optax.cosine_decay_schedule(0.05, updates), momentum=0.9), many)
    options = dict(steps=updates * many, every=updates * many, batch_size=n, seed=seed)
    for state, line in study.train(model, optimizer, data, **options):  # noqa: B007
        yield line
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    rows = np.random.default_rng(seed).permutation(len(data.test.labels))[:images]
    x, labels = jnp.float32(data.test.images[rows]) / 255, data.test.labels[rows]

    def line_of(logits: jax.Array, **found: Any) -> study.Line:
        """Returns a line with the test error in %."""
        return {"kind": "error", **found, "error": 100 * float((logits.argmax(-1).ravel() != labels).mean())}

    evaluate = partial(model.apply, train=False)
    for weight in WEIGHTS:
        logits = jax.jit(partial(tools.weigh_examples, evaluate, weight=weight))(variables, x)
        yield line_of(logits, weight=weight)
    batches = np.split(jnp.float32(data.train.images[: 10 * (images // 10)]) / 255, 10)
    apply_fn = partial(evaluate, mutable=["batch_stats"])
    yield line_of(evaluate(tools.recalibrate(apply_fn, variables, batches, progress=False), x), how=RECALIBRATED)
    train = jax.vmap(lambda part: model.apply(variables, part, train=True, mutable=["batch_stats"])[0])
    yield line_of(train(x.reshape(-1, n, *x.shape[1:])), how=TRAINING)


def error(setting: str, **chosen: Any) -> Measure:
    """Returns a measure: the test error in %, of the line with these values."""
    chosen |= {"setting": setting}
    return lambda lines: next((x["error"] for x in lines if chosen.items() <= x.items()), float("nan"))


OTHERS = {"running averages": {"weight": 0.0}, "recalibrated statistics": {"how": RECALIBRATED}}
CLAIMS = tuple(
    Claim(f"Of {n}: 1/{n} of each image errs less than {name}", error(s, weight=1 / n), "<", error(s, **chosen))
    for name, chosen in OTHERS.items()
    for s, n in SETTINGS.items()
)
DISTANCE = "a CNN of four layers on Fashion-MNIST instead of ResNets on CIFAR-100 and ImageNet; no weight is learned."


def errors(lines: list[study.Line], setting: str, **chosen: Any) -> list[float]:
    """Returns the test error in % for every seed."""
    seeds = sorted({line["seed"] for line in lines})
    return [error(setting, **chosen)([line for line in lines if line["seed"] == seed]) for seed in seeds]


def table(lines: list[study.Line]) -> str:
    """Makes a table of test errors by training and evaluation."""
    columns = {RECALIBRATED: {"how": RECALIBRATED}, **{f"w = {w:g}": {"weight": w} for w in WEIGHTS}}
    columns[TRAINING] = {"how": TRAINING}
    text = [f"| test error, % | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for setting in SETTINGS:
        cells = [study.spread(errors(lines, setting, **chosen), 1) for chosen in columns.values()]
        text.append(f"| {setting} | {' | '.join(cells)} |")
    return "\n".join(text)


def draw(lines: list[study.Line], figure: Figure) -> None:
    """Draws the test error by the weight of an image, and beside it that of recalibrated statistics."""
    axes = figure.subplots()
    for i, (setting, n) in enumerate(SETTINGS.items()):
        found = np.array([errors(lines, setting, weight=w) for w in WEIGHTS]).T
        study.band(axes, np.array(WEIGHTS), found, label=setting, marker="o")
        axes.plot(1 / n, found.mean(0)[WEIGHTS.index(1 / n)], "*", color=f"C{i}", ms=14)
        for how, style in ((RECALIBRATED, ":"), (TRAINING, "--")):
            axes.axhline(np.mean(errors(lines, setting, how=how)), color=f"C{i}", ls=style, lw=1)
    for how, mark in (
        (RECALIBRATED, {"ls": ":"}),
        (TRAINING, {"ls": "--"}),
        ("1/n", {"marker": "*", "ls": "", "ms": 14}),
    ):
        axes.plot([], [], color="grey", label=how, **mark)
    axes.set(xlabel="w, the weight of an image in the statistics that normalise it", ylabel="test error, %")
    study.below(axes, 3)


STUDY = study.Study("few_images", tuple(SETTINGS), trial, table, draw, size=(8, 5), claims=CLAIMS, distance=DISTANCE)

if __name__ == "__main__":
    study.run(STUDY, __doc__, RESULTS)
