"""A CNN on 1,000 digits without a regulariser, with L1, L2, dropout, BN, and BN with L2: accuracy, gap, weight norms.

Claim:    BN regularises; L2 in front of BN does not, it only raises the effective learning rate η/‖w‖².
Command:  python -m experiments.repro.vanlaarhoven2017                      # --smoke: seconds
Hardware: 2 CPU cores
Time:     5 min of one core

van Laarhoven 2017, https://arxiv.org/abs/1706.05350, sections 2 and 4 (there a ResNet on CIFAR-10). The last setting is
that claim to the letter: L2 nowhere but in the head, and a learning rate of the convolutions that grows as L2 would
shrink them (Li & Arora 2020, https://arxiv.org/abs/1910.07454). Plain SGD, batches of 50; the test digits are 4,000
others. Stronger L1 and L2 than these are worse on them.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from bnjax.linen import BatchNorm
from bnjax.tools import decay_mask
from experiments.data.images import Splits, embedded_digits
from experiments.models.convolutional import ConvNet, Unnormalised
from experiments.repro import study
from experiments.repro.claims import Claim, Measure, of

RATE, L1, L2, L2_OF_BN, DROPPED = 0.1, 3e-4, 3e-3, 1e-2, 0.3
CONVOLUTIONS = ("Conv_0", "Conv_1", "Conv_2")
SHOWN = 1  # the convolution whose norm the table and the picture show


class Dropout(nn.Module):
    """Applies dropout in the place of a norm; before or after the ReLU behind it, dropout has the same effect."""

    use_running_average: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dropout(DROPPED, deterministic=self.use_running_average)(x)


def shrunk(step: Any) -> Any:
    """Returns the factor by which L2 alone shrinks a weight in this many steps."""
    return (1 - RATE * L2_OF_BN) ** step


def rate(setting: str, step: Any) -> Any:
    """Returns the learning rate of the convolutions at a step."""
    return RATE / (shrunk(step) * shrunk(step + 1)) if setting == GROWING else RATE


def penalised(gradient: Callable[[Any], Any], **mask: Any) -> optax.GradientTransformation:
    """Builds SGD on the loss plus a penalty of the kernels whose gradient is `gradient(kernel)`."""

    def add(updates: Any, params: Any) -> Any:
        return jax.tree.map(lambda g, w: g + gradient(w), updates, params)

    return optax.chain(optax.masked(optax.stateless(add), partial(decay_mask, **mask)), optax.sgd(RATE))


def growing() -> optax.GradientTransformation:
    """Builds SGD with L2 on the head only, and a growing rate for the convolutions; `penalised` already returns −RATE ·
    gradient.
    """
    grow = optax.scale_by_schedule(lambda step: rate(GROWING, step) / RATE)
    labels = {True: grow, False: optax.identity()}
    of_convolutions = optax.multi_transform(labels, lambda params: {name: name in CONVOLUTIONS for name in params})
    return optax.chain(penalised(lambda w: L2_OF_BN * w, no_decay=["Conv_*"]), of_convolutions)


BN = partial(BatchNorm, momentum=0.9)
GROWING = "BN, growing rate"
SETTINGS = {
    "none": (Unnormalised, optax.sgd(RATE)),
    "L1": (Unnormalised, penalised(lambda w: L1 * jnp.sign(w))),
    "L2": (Unnormalised, penalised(lambda w: L2 * w)),
    "dropout": (Dropout, optax.sgd(RATE)),
    "BN": (BN, optax.sgd(RATE)),
    "BN + L2": (BN, penalised(lambda w: L2_OF_BN * w)),
    GROWING: (BN, growing()),
}


def trial(setting: str, seed: int, config: study.Config) -> Iterator[study.Line]:
    """Trains one setting; yields training and test accuracy in evaluation mode, and the norm of each convolution's
    kernel.
    """
    others, thousand = embedded_digits()
    norm, optimizer = SETTINGS[setting]
    model = ConvNet(norm, widths=config.pick((8, 16, 32), (2, 4, 8), full=(32, 64, 128)))
    options = dict(steps=config.pick(500, 40, full=5_000), every=config.pick(50, 20, full=200), batch_size=50)
    score = study.scorer(model)
    for state, line in study.train(model, optimizer, Splits(thousand, others), seed=seed, **options):
        norms = [float(jnp.linalg.norm(state.params[name]["kernel"])) for name in CONVOLUTIONS]
        yield {**line, "fitted": score(state, thousand)["accuracy"], "norms": norms}


def effective_rate(lines: list[study.Line], setting: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps, and the effective learning rate η/‖w‖² of one convolution `[seeds, T]`."""
    steps, norms = study.curves(lines, setting, "step", "norms")
    return steps, rate(setting, steps) / norms[..., SHOWN] ** 2


def table(lines: list[study.Line]) -> str:
    """Makes a table of final accuracies, their gap, and the norm and effective learning rate of one convolution."""
    text = ["| | training accuracy, % | test accuracy, % | gap | ‖w‖ | η/‖w‖² |", "|---|---|---|---|---|---|"]
    for setting in SETTINGS:
        fitted, accuracy = (
            100 * study.curves(lines, setting, "step", name)[1][:, -1] for name in ("fitted", "accuracy")
        )
        norm = study.curves(lines, setting, "step", "norms")[1][:, -1, SHOWN]
        cells = [study.spread(values, 2) for values in (fitted, accuracy, fitted - accuracy, norm)]
        invariant = SETTINGS[setting][0] is BN
        cells.append(study.spread(effective_rate(lines, setting)[1][:, -1], 4) if invariant else "")
        text.append(f"| {setting} | {' | '.join(cells)} |")
    return "\n".join(text)


def draw(lines: list[study.Line], figure: Figure) -> None:
    """Draws test error, the norm of one convolution, and its effective learning rate if BN follows it."""
    error, norms, rates = figure.subplots(1, 3)
    for i, setting in enumerate(SETTINGS):
        style = dict(label=setting, color=f"C{i}", ls="--" if setting == GROWING else "-")
        steps, accuracy = study.curves(lines, setting, "step", "accuracy")
        study.band(error, steps, 100 * (1 - accuracy), **style)
        steps, values = study.curves(lines, setting, "step", "norms")
        study.band(norms, steps, values[..., SHOWN], **style)
        if SETTINGS[setting][0] is BN:
            study.band(rates, *effective_rate(lines, setting), **style)
    error.set(title="error", ylabel="test error, %", yscale="log")
    norms.set(title="norm of a kernel", ylabel=f"‖w‖ of convolution {SHOWN + 1}")
    rates.set(title="effective rate", ylabel=f"effective rate η/‖w‖² of convolution {SHOWN + 1}", yscale="log")
    for axes in (error, rates):
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(ScalarFormatter())
    for axes in (error, norms, rates):
        axes.set_xlabel("training step")
        study.below(axes)


def end(setting: str, name: str = "accuracy") -> Measure:
    """Returns a measure: an accuracy at the end in %."""
    return of(setting, name, lambda values: 100 * values[-1])


def gap(setting: str) -> Measure:
    """Returns a measure: the training accuracy less the test accuracy at the end in %."""
    return lambda lines: end(setting, "fitted")(lines) - end(setting)(lines)


CLAIMS = (
    Claim("BN has a smaller gap than no regulariser", gap("BN"), "<", gap("none")),
    Claim("BN with L2 is as accurate as BN with the rate that L2 amounts to", end("BN + L2"), "=", end(GROWING), 0.5),
    Claim("BN with L2 is more accurate than BN", end("BN + L2"), ">", end("BN")),
)
DISTANCE = "a CNN of three layers on 1,000 digits instead of a ResNet on CIFAR-10; plain SGD without momentum."
STUDY = study.Study(
    "vanlaarhoven2017", tuple(SETTINGS), trial, table, draw, size=(13, 5.5), claims=CLAIMS, distance=DISTANCE
)

if __name__ == "__main__":
    study.run(STUDY, __doc__)
