"""Averaged weights, SWA and EMA, evaluated with stale, copied, followed and recalibrated statistics.

Claim:    The average of weights far apart (SWA) needs recalibrated statistics; that of an EMA close to the network can
          do with the network's own, or with statistics that follow as the weights do.
Command:  python -m experiments.gallery.averaged                # --smoke: seconds
Hardware: 1 CPU core
Time:     2 min

Izmailov et al. 2018, https://arxiv.org/abs/1803.05407: SWA averages weights along training at a high rate, and takes
the statistics again. Cai et al. 2021, https://arxiv.org/abs/2101.08482: the statistics of a teacher follow as its
weights do (`bnjax.tools.follow`). One training at a constant rate; every eight steps its weights join both averages.
Stale statistics are those of the network when the averages began, halfway.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from matplotlib.figure import Figure

from bnjax import tools
from bnjax.linen import BatchNorm
from experiments.data.images import Labelled, embedded_digits
from experiments.gallery import RESULTS
from experiments.models.convolutional import StridedNet
from experiments.repro import study
from experiments.repro.claims import Claim, Measure

SETTING, NETWORK, EVERY, MOMENTUM = "StridedNet, batches of 50", "the network itself", 8, 0.9
AVERAGES, STATISTICS = ("SWA", "EMA"), ("stale", "copied", "followed", "recalibrated")


def trial(setting: str, seed: int, config: study.Config) -> Iterator[study.Line]:
    """Trains once; yields the test error of the network and of both averages with each kind of statistics."""
    data, steps = embedded_digits(), config.pick(640, 32)
    model = StridedNet(partial(BatchNorm, momentum=0.9), config.pick((8, 16, 32), (2, 4)))
    apply_fn = partial(model.apply, train=False, mutable=["batch_stats"])
    images = [image / np.float32(255) for image in np.split(data.train.images[::2], 10)]
    score, averages = study.scorer(model), {}
    options = dict(steps=steps, every=EVERY, batch_size=50, seed=seed)
    for state, line in study.train(model, optax.sgd(0.2, momentum=0.9), data, **options):
        network = {"params": state.params, "batch_stats": state.batch_stats}
        if line["step"] == steps // 2:
            averages, stale = dict.fromkeys(AVERAGES, jax.device_get(network)), jax.device_get(state.batch_stats)
        elif line["step"] > steps // 2:
            count = (line["step"] - steps // 2) // EVERY + 1
            for name, momentum in (("SWA", 1 - 1 / count), ("EMA", MOMENTUM)):
                averages[name] = tools.follow(averages[name], network, momentum=momentum)

    def error(weights: str, statistics: str, variables: Any) -> study.Line:
        """Returns a line with the test error in %."""
        found = 100 * (1 - score(state._replace(**variables), Labelled(*data.test))["accuracy"])
        return {"kind": "error", "weights": weights, "statistics": statistics, "error": found}

    yield error(NETWORK, "copied", network)
    for name, followed in averages.items():
        recalibrated = tools.recalibrate(apply_fn, followed, images, progress=False)["batch_stats"]
        each = (stale, state.batch_stats, followed["batch_stats"], recalibrated)
        for statistics, stats in zip(STATISTICS, each, strict=True):
            yield error(name, statistics, {"params": followed["params"], "batch_stats": stats})


def error(weights: str, statistics: str = "copied") -> Measure:
    """Returns a measure: the test error of these weights with these statistics in %."""
    chosen = {"weights": weights, "statistics": statistics}
    return lambda lines: next(line["error"] for line in lines if chosen.items() <= line.items())


CLAIMS = (
    Claim("SWA: copied statistics err more than recalibrated", error("SWA"), ">", error("SWA", "recalibrated")),
    Claim("SWA: stale statistics err more", error("SWA", "stale"), ">", error("SWA", "recalibrated")),
    Claim("SWA: followed statistics err more", error("SWA", "followed"), ">", error("SWA", "recalibrated")),
    Claim("EMA: copied statistics err as recalibrated", error("EMA"), "=", error("EMA", "recalibrated"), 0.5),
    Claim(
        "EMA: followed statistics err as recalibrated", error("EMA", "followed"), "=", error("EMA", "recalibrated"), 0.5
    ),
    Claim("SWA, recalibrated, errs less than the network", error("SWA", "recalibrated"), "<", error(NETWORK)),
)
DISTANCE = "a CNN of three layers on 4,000 digits at a constant rate instead of a ResNet on CIFAR with a cyclical one."


def errors(lines: list[study.Line], weights: str, statistics: str) -> list[float]:
    """Returns the test error in % for every seed."""
    return [
        error(weights, statistics)([x for x in lines if x["seed"] == s]) for s in sorted({x["seed"] for x in lines})
    ]


def table(lines: list[study.Line]) -> str:
    """Makes a table of the errors by weights and statistics."""
    text = [f"| test error, % | {' | '.join(STATISTICS)} |", "|---" * (len(STATISTICS) + 1) + "|"]
    text += [f"| {w} | {' | '.join(study.spread(errors(lines, w, s), 2) for s in STATISTICS)} |" for w in AVERAGES]
    return "\n".join([*text, f"| {NETWORK} | | {study.spread(errors(lines, NETWORK, 'copied'), 2)} | | |"])


def draw(lines: list[study.Line], figure: Figure) -> None:
    """Draws the errors of each seed by weights and statistics."""
    axes = figure.subplots()
    for i, weights in enumerate(AVERAGES):
        for place, statistics in enumerate(STATISTICS):
            found = errors(lines, weights, statistics)
            axes.plot(
                [place + 0.1 * i] * len(found), found, "os"[i], color=f"C{i}", label=weights if not place else None
            )
    network = errors(lines, NETWORK, "copied")
    axes.axhline(np.mean(network), color="grey", ls=":", label=f"{NETWORK}, mean of the seeds")
    axes.set_xticks(range(len(STATISTICS)), STATISTICS)
    axes.set(xlabel="statistics", ylabel="test error, %, of each seed", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    study.below(axes, 3)


STUDY = study.Study("averaged", (SETTING,), trial, table, draw, size=(7, 4.5), claims=CLAIMS, distance=DISTANCE)

if __name__ == "__main__":
    study.run(STUDY, __doc__, RESULTS)
