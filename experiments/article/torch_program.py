"""Section 4.2 of the article: its PyTorch program with the wrong number mended, and ported to Flax, Optax and bnjax.

Claim:    From the same weights the port of the article's PyTorch program has the losses of the repaired original to
          1e-5 over its 5 full-batch steps.
Command:  python -m experiments.article.torch_program                # --smoke: seconds
Hardware: 2 CPU cores
Time:     5 min of one core

Original and port begin with the same weights and see all 4,000 digits in each of the 5 steps. The port also trains 5
epochs of batches of 32, as the article's Keras program does. The original needs `pip install "bnjax[peers]"`; without
PyTorch its rows are left out.
"""

import importlib.util
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from experiments.article import torch_port, training
from experiments.repro import study

PORT, ORIGINAL, BATCHES = "port", "repaired original in PyTorch", "port, 5 epochs of batches of 32"
SETTINGS = {PORT: None, ORIGINAL: None, BATCHES: 32}  # images in each step; None: all
INSTALLED = importlib.util.find_spec("torch") is not None


def original(weights: Any) -> training.Trained:
    """Returns the article's program, repaired and started with these weights."""
    from experiments.article.torch_original import Original

    return Original(weights)


def trial(setting: str, seed: int, config: study.Config) -> Iterator[study.Line]:
    """Yields the first losses and the accuracy by epoch."""
    port = training.Port(torch_port, seed)
    trained = original(torch_port.save(training.variables_of(port.state))) if setting == ORIGINAL else port
    yield from training.train(trained, training.digits(config), 5, SETTINGS[setting], seed)


RUNNABLE = tuple(setting for setting in SETTINGS if setting != ORIGINAL or INSTALLED)
WHAT = dict(settings=SETTINGS, port=PORT, original=ORIGINAL)
STUDY = study.Study("torch_program", RUNNABLE, trial, partial(training.table, **WHAT), partial(training.draw, **WHAT))

if __name__ == "__main__":
    study.run(STUDY, __doc__, Path(__file__).parent / "results")
