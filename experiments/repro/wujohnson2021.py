"""What evaluation normalises by: running averages of several momenta, or statistics of N batches taken afresh.

Claim:    While the weights move fast, running averages with a long memory trail them and evaluation errs; statistics
          recalibrated over a hundred images do not. At the end, when the rate is small, they err as much as
          running averages that have forgotten where they started.
Command:  python -m experiments.repro.wujohnson2021              # --smoke: seconds; --full: ten times the steps
Hardware: 2 CPU cores
Time:     4 min of one core

Wu & Johnson 2021, https://arxiv.org/abs/2105.07576, section 3 (there ResNet-50 on ImageNet, batches of 256 and 8,192).
One training serves all statistics: its layers keep every running average side by side. Debiased averages leave the
starting values, 0 and 1, out. Fashion-MNIST, batches of 32 and of 256 with a rate in proportion to its square root;
statistics are recalibrated over N batches of 32.
"""

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure

import bnjax
from bnjax import tools
from experiments.data.images import Labelled, Splits
from experiments.data.pipeline import training_batches
from experiments.models.convolutional import StridedNet
from experiments.repro import study
from experiments.repro.claims import Claim, Measure, of
from experiments.train.loop import TrainState, as_float

SETTINGS = {"batches of 32": 32, "batches of 256": 256}
AVERAGES = {
    "EMA 0.9": dict(momentum=0.9),
    "EMA 0.99": dict(momentum=0.99),
    "EMA 0.999": dict(momentum=0.999),
    "EMA 0.99, debiased": dict(momentum=0.99, debias=True),
    "EMA 0.999, debiased": dict(momentum=0.999, debias=True),
}
PART = 32  # images in each batch of a recalibration
COUNTS = (1, 4, 16, 64, 200)
PRECISE = {count: f"recalibrated, N = {count}" for count in COUNTS}
MODEL = partial(StridedNet, widths=(8, 16, 32))
POINTS, TICKS = 8, (10, 15, 20, 30, 50)


class Averages(nn.Module):
    """Batch normalization that keeps all running averages in `AVERAGES`, and evaluates with the first of them."""

    use_running_average: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = x.shape[-1:]
        affine = self.param("scale", nn.initializers.ones, shape), self.param("bias", nn.initializers.zeros, shape)
        start = bnjax.RunningStats(jnp.zeros(shape), jnp.ones(shape), jnp.zeros(shape))
        kept = {name: self.variable("batch_stats", name, lambda: start) for name in AVERAGES}
        if self.use_running_average:
            running = kept[next(iter(AVERAGES))].value
            return bnjax.normalize(x, running.mean, running.var, *affine)
        y, moments = bnjax.batch_norm(x, *affine)
        for name, options in AVERAGES.items():
            kept[name].value = bnjax.update_running(kept[name].value, moments, **options)
        return y


def variables(state: TrainState, average: str) -> dict[str, Any]:
    """Returns the variables for the same network with `bnjax.BatchNorm`, filled with one of the averages."""
    stats = {layer: {"mean": kept[average].mean, "var": kept[average].var} for layer, kept in state.batch_stats.items()}
    trees = {"params": state.params, "batch_stats": stats}
    return {name: {k.replace("Averages", "BatchNorm"): v for k, v in tree.items()} for name, tree in trees.items()}


def trial(setting: str, seed: int, config: study.Config) -> Iterator[study.Line]:
    """Trains one setting; yields the error on 2,500 test images with each kind of statistics, several times."""
    batch, steps = SETTINGS[setting], config.pick(400, 4, full=4_000)
    data, model = study.pictures(config), MODEL(bnjax.BatchNorm)
    data = Splits(data.train, Labelled(*(part[:2_500] for part in data.test)))
    batches = list(islice(training_batches(data.train, PART, 1, seed=seed + 1_000, max_shift=0), max(COUNTS)))
    score = study.scorer(model)

    def error(state: TrainState, found: dict[str, Any]) -> float:
        """Returns the test error in % with these variables."""
        return 100 * (1 - score(state._replace(**found), data.test)["accuracy"])

    optimizer = optax.sgd(optax.cosine_decay_schedule(0.05 * (batch / 32) ** 0.5, steps), momentum=0.9)
    options = dict(steps=steps, every=steps // POINTS or steps, batch_size=batch, seed=seed)
    for state, line in study.train(MODEL(Averages), optimizer, data, **options):
        by_average = {name: error(state, variables(state, name)) for name in AVERAGES}
        some = variables(state, "EMA 0.9")
        precise = {n: tools.recalibrate(partial(look, model), some, batches[:n], progress=False) for n in COUNTS}
        yield line | by_average | {PRECISE[n]: error(state, found) for n, found in precise.items()}


def look(model: nn.Module, variables: Any, batch: Any) -> Any:
    """Applies the network in evaluation mode, as `recalibrate` calls it."""
    return model.apply(variables, as_float(batch), train=False, mutable=["batch_stats"])


def errors(lines: list[study.Line], setting: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns steps `[T]`, and the test error in % with one kind of statistics for every seed `[seeds, T]`."""
    return study.curves(lines, setting, "step", name)


def table(lines: list[study.Line]) -> str:
    """Makes a table of the error at the first evaluation, its mean over the training, and the final error."""
    heads = [f"{setting}: {when}" for setting in SETTINGS for when in ("after an eighth", "mean", "at the end")]
    text = [f"| test error, % | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name in (*AVERAGES, *PRECISE.values()):
        cells = []
        for setting in SETTINGS:
            _, error = errors(lines, setting, name)
            cells += [study.spread(column, 2) for column in (error[:, 0], error.mean(1), error[:, -1])]
        text.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(text)


def draw(lines: list[study.Line], figure: Figure) -> None:
    """Draws error by step for each training, and by the number of batches used for recalibration."""
    *by_step, by_count = figure.subplots(1, len(SETTINGS) + 1)
    for axes, setting in zip(by_step, SETTINGS, strict=True):
        for name, style in zip((*AVERAGES, PRECISE[64]), ("-", "-", "-", "--", "--", ":"), strict=True):
            study.band(axes, *errors(lines, setting, name), label=name, ls=style, marker="." if style == ":" else None)
        axes.set(xlabel="training step", ylabel="test error, %", yscale="log", title=setting)
        axes.set_yticks(TICKS, [str(tick) for tick in TICKS])
        axes.minorticks_off()
        study.below(axes)
    for setting, color in zip(SETTINGS, ("C0", "C1"), strict=True):
        best = errors(lines, setting, PRECISE[max(COUNTS)])[1]
        over = [(errors(lines, setting, name)[1] - best).mean(1) for name in ("EMA 0.9", *PRECISE.values())]
        study.band(by_count, PART * np.array(COUNTS), np.stack(over[1:], 1), label=setting, marker="o", color=color)
        by_count.axhline(over[0].mean(), ls="--", color=color, label=f"{setting}, EMA 0.9")
    label = f"test error, %, over that of N = {max(COUNTS)} (mean of steps)"
    by_count.set(xscale="log", xlabel="images recalibrated over", ylabel=label, title="how many images it takes")
    study.below(by_count)


LARGE = "batches of 256"


def at(name: str, when: int) -> Measure:
    """Returns a measure: the test error with one kind of statistics, with large batches, at one of the evaluations."""
    return of(LARGE, name, lambda values: values[when])


EARLY, END = 0, -1
CLAIMS = (
    Claim(
        "Early, EMA 0.99 errs more than statistics of 64 batches", at("EMA 0.99", EARLY), ">", at(PRECISE[64], EARLY)
    ),
    Claim("Early, debiased EMA 0.99 errs more", at("EMA 0.99, debiased", EARLY), ">", at(PRECISE[64], EARLY)),
    Claim("Early, EMA 0.9 errs more", at("EMA 0.9", EARLY), ">", at(PRECISE[64], EARLY)),
    Claim("At the end EMA 0.9 errs as much", at("EMA 0.9", END), "=", at(PRECISE[64], END), 0.5),
    Claim(
        "At the end EMA 0.999, which remembers its start, errs more", at("EMA 0.999", END), ">", at(PRECISE[64], END)
    ),
)
DISTANCE = (
    "a CNN of three layers on Fashion-MNIST for 400 steps instead of ResNet-50 on ImageNet; batches of 256 "
    "instead of 8,192."
)
STUDY = study.Study(
    "wujohnson2021", tuple(SETTINGS), trial, table, draw, size=(14, 5.5), claims=CLAIMS, distance=DISTANCE
)

if __name__ == "__main__":
    study.run(STUDY, __doc__)
