"""Section 4.1 of the article: its Keras program as it stands there, and ported to Flax, Optax and bnjax.

Claim:    From the same weights the port of the article's Keras program has the losses of the original to 1e-5 over 20
          steps, and learns as much in its 5 epochs.
Command:  python -m experiments.article.keras_program                # --smoke: seconds
Hardware: 2 CPU cores
Time:     5 min of one core

Original and port begin with the same weights and see the same batches of 32 of the 4,000 digits. After the port's last
epoch the 1,000 held-back digits are also evaluated by what the article's section 3.1 would keep instead of running
averages: the mean and variance of y. The original needs `pip install "bnjax[peers]"`; without Keras its rows are left
out.
"""

import importlib.util
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bnjax.tools import recalibrate
from experiments.article import keras_port, training
from experiments.data.images import Labelled
from experiments.repro import study

PORT, ORIGINAL, FULL_BATCH = "port", "original in Keras", "port, 5 full-batch steps"
SETTINGS = {PORT: 32, ORIGINAL: 32, FULL_BATCH: None}  # images in each step; None: all
EPSILON = keras_port.DEFAULTS["epsilon"]
INSTALLED = importlib.util.find_spec("keras") is not None
EVALUATED = (
    "running averages of x",
    "mean and variance of x in the last batch, without averaging",
    "mean and variance of y in the last batch, as in the article's 3.1",
)


def original(weights: Any) -> training.Trained:
    """Returns the article's program, started with these weights."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    from experiments.article.keras_original import Original

    return Original(weights)


def trial(setting: str, seed: int, config: study.Config) -> Iterator[study.Line]:
    """Yields the first losses, the accuracy by epoch and, for the port, by other statistics than running averages."""
    port = training.Port(keras_port, seed)
    trained = original(keras_port.save(training.variables_of(port.state))) if setting == ORIGINAL else port
    data = training.digits(config)
    yield from training.train(trained, data, 5, SETTINGS[setting], seed)
    if setting == PORT:
        yield {"kind": "evaluation", **by_other_statistics(port, data.test)}


def by_other_statistics(port: training.Port, data: Labelled) -> dict[str, float]:
    """Returns the accuracy on digits that are normalised, in evaluation, by each of `EVALUATED`."""
    images = data.images / np.float32(255)
    variables = training.variables_of(port.state)
    apply = partial(port.model.apply, train=False, mutable=["batch_stats"])
    of_x = recalibrate(apply, variables, [port.last_images], progress=False)[
        "batch_stats"
    ]  # over one batch: its own, not averaged
    of_y = {name: {"mean": 0 * s["mean"], "var": s["var"] / (s["var"] + EPSILON)} for name, s in of_x.items()}
    accuracies = (
        float((port.logits(images, batch_stats=stats).argmax(-1) == data.labels).mean())
        for stats in (port.state.batch_stats, of_x, of_y)
    )
    return dict(zip(EVALUATED, accuracies, strict=True))


def table(lines: list[study.Line]) -> str:
    """Returns the table of both, and the accuracy by other statistics."""
    rows = [line for line in lines if line["kind"] == "evaluation"]
    text = [
        training.table(lines, SETTINGS, PORT, ORIGINAL),
        "",
        "| the port, evaluated by | test accuracy, % |",
        "|---|---|",
    ]
    text += [f"| {name} | {study.spread([100 * row[name] for row in rows], 1)} |" for name in EVALUATED]
    return "\n".join(text)


RUNNABLE = tuple(setting for setting in SETTINGS if setting != ORIGINAL or INSTALLED)
DRAW = partial(training.draw, settings=SETTINGS, port=PORT, original=ORIGINAL)
STUDY = study.Study("keras_program", RUNNABLE, trial, table, DRAW)

if __name__ == "__main__":
    study.run(STUDY, __doc__, Path(__file__).parent / "results")
