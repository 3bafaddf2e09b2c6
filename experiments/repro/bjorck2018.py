"""The same CNN with and without BN at several learning rates: which rates train, and how many steps they take.

Claim:    BN widens the range of learning rates that train a CNN, and at its best rate needs fewer steps.
Command:  python -m experiments.repro.bjorck2018                 # --smoke: seconds
Hardware: 2 CPU cores
Time:     15 min of one core

Bjorck, Gomes, Selman & Weinberger 2018, https://arxiv.org/abs/1806.02375, figure 1 (there a ResNet on CIFAR-10).
Three times conv 3×3 → norm → ReLU → pooling, and a Dense layer, with BN and without; SGD with momentum 0.9, batches of
50 of the 4,000 digits.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
import optax
from matplotlib.figure import Figure

from bnjax.linen import BatchNorm
from experiments.data.images import embedded_digits
from experiments.models.convolutional import ConvNet, Unnormalised
from experiments.repro import study
from experiments.repro.claims import Claim, Measure

RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
NORMS = {"with BN": partial(BatchNorm, momentum=0.9), "without": Unnormalised}
SETTINGS = {f"{norm}, rate {rate:g}": (norm, rate) for norm in NORMS for rate in RATES}
TRAINED = 0.9  # accuracy that counts as trained


def trial(setting: str, seed: int, config: study.Config) -> Iterator[study.Line]:
    """Trains one setting, and yields loss and accuracy on the held-back digits as training goes on."""
    norm, rate = SETTINGS[setting]
    options = dict(steps=config.pick(400, 20, full=4_000), every=20, batch_size=50, seed=seed)
    model = ConvNet(NORMS[norm], widths=(8, 16, 32))
    for _, line in study.train(model, optax.sgd(rate, momentum=0.9), embedded_digits(), **options):
        yield line


def table(lines: list[study.Line]) -> str:
    """Makes a table: final accuracy at each rate, the rates that train, and the steps to 90 % at the best of them."""
    text = [f"| | {' | '.join(f'rate {rate:g}' for rate in RATES)} | rates that train | steps to 90 % at the best |"]
    text.append("|---" * (len(RATES) + 3) + "|")
    for norm in NORMS:
        runs = {rate: study.curves(lines, f"{norm}, rate {rate:g}", "step", "accuracy") for rate in RATES}
        finals = {rate: accuracy[:, -1] for rate, (_, accuracy) in runs.items()}
        good = [rate for rate in RATES if finals[rate].min() >= TRAINED]
        steps = [study.steps_to(*runs[rate], TRAINED) for rate in good]
        best = min((int(s) for s in steps), default=None)
        cells = [study.spread(finals[rate], 2) for rate in RATES]
        ranged = f"{good[0]:g} to {good[-1]:g}" if good else "none"
        text.append(f"| {norm} | {' | '.join(cells)} | {ranged} | {best or 'not reached'} |")
    return "\n".join(text)


def draw(lines: list[study.Line], figure: Figure) -> None:
    """Draws final accuracy by learning rate, and the curves of each norm at its best rate."""
    by_rate, by_step = figure.subplots(1, 2)
    for norm in NORMS:
        runs = [study.curves(lines, f"{norm}, rate {rate:g}", "step", "accuracy") for rate in RATES]
        finals = np.array([accuracy[:, -1] for _, accuracy in runs])
        study.band(by_rate, np.array(RATES), finals.T, label=norm, marker="o")
        best = int(np.argmax([accuracy.mean() for _, accuracy in runs]))
        study.band(by_step, *runs[best], label=f"{norm}, rate {RATES[best]:g}")
    by_rate.set(xscale="log", xlabel="learning rate", ylabel="accuracy on held-back digits, at the end")
    by_step.set(
        xlabel="training step", ylabel="accuracy on held-back digits", title="each at the rate that learns fastest"
    )
    for axes in (by_rate, by_step):
        study.below(axes)


WITH, WITHOUT = NORMS


def accuracies(lines: list[study.Line], norm: str) -> dict[float, list[tuple[int, float]]]:
    """Returns the step and accuracy of each evaluation of one seed, by rate."""
    return {
        rate: [(x["step"], x["accuracy"]) for x in lines if x["setting"] == f"{norm}, rate {rate:g}" and "step" in x]
        for rate in RATES
    }


def decades(norm: str) -> Measure:
    """Returns a measure: the decades between the lowest and the highest rate that train; −1 where none does."""

    def measure(lines: list[study.Line]) -> float:
        good = [rate for rate, found in accuracies(lines, norm).items() if found and found[-1][1] >= TRAINED]
        return float(np.log10(good[-1] / good[0])) if good else -1.0

    return measure


def fewest_steps(norm: str) -> Measure:
    """Returns a measure: the fewest steps to `TRAINED` at any rate; the last step where it is never reached."""

    def measure(lines: list[study.Line]) -> float:
        found = [pair for pairs in accuracies(lines, norm).values() for pair in pairs]
        return float(min((step for step, accuracy in found if accuracy >= TRAINED), default=max(found)[0]))

    return measure


CLAIMS = (
    Claim("With BN more decades of rates train to 90 %", decades(WITH), ">", decades(WITHOUT)),
    Claim("At the best rate BN takes fewer steps to 90 %", fewest_steps(WITH), "<", fewest_steps(WITHOUT)),
)
DISTANCE = (
    "a CNN of four layers on 4,000 digits for 400 steps instead of a ResNet of 110 layers on CIFAR-10; rates a "
    "factor of three apart."
)
STUDY = study.Study("bjorck2018", tuple(SETTINGS), trial, table, draw, claims=CLAIMS, distance=DISTANCE)

if __name__ == "__main__":
    study.run(STUDY, __doc__)
