"""Only scale and bias of BN train, in a network whose other weights stay random.

Claim:    Scale and bias of BN alone, in a random network, learn more than as many other weights of each channel do.
Command:  python -m experiments.gallery.only_bn                 # --smoke: seconds
Hardware: 1 CPU core
Time:     2 min of one core

Frankle, Schwab & Morcos 2021, https://arxiv.org/abs/2003.00152: ResNets on CIFAR-10 and ImageNet in which only BN
trains. Two parameters of each channel train here too, either scale and bias or two weights of its kernel; the output
layer stays random in both. Beside them all parameters, and the output layer alone.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from matplotlib.figure import Figure

from bnjax.linen import BatchNorm
from experiments.data.images import embedded_digits
from experiments.gallery import RESULTS
from experiments.models.convolutional import StridedNet
from experiments.repro import study
from experiments.repro.claims import Claim, Measure, of

ALL, ONLY_BN, TWO_WEIGHTS, OUTPUT = "all", "scale and bias of BN", "two weights of each kernel", "the output layer"
SETTINGS = (ALL, ONLY_BN, TWO_WEIGHTS, OUTPUT)


def trained(setting: str, params: Any) -> Any:
    """Returns 1 where a setting trains and 0 elsewhere, for each parameter an array that broadcasts to it."""

    def of_leaf(path: Any, leaf: Any) -> Any:
        layer = path[0].key
        if setting == TWO_WEIGHTS:  # the first two of the weights that lead to each channel
            first = jnp.arange(leaf.size // leaf.shape[-1]).reshape(*leaf.shape[:-1], 1) < 2
            return first * 1.0 if layer.startswith("Conv") else 0.0
        prefix = {ALL: "", ONLY_BN: "BatchNorm", OUTPUT: "Dense"}[setting]
        return float(layer.startswith(prefix))

    return jax.tree_util.tree_map_with_path(of_leaf, params)


def only(setting: str) -> optax.GradientTransformation:
    """Sets the updates to zero where a setting does not train."""
    return optax.stateless(lambda updates, params: jax.tree.map(jnp.multiply, updates, trained(setting, params)))


def trial(setting: str, seed: int, config: study.Config) -> Iterator[study.Line]:
    """Trains one setting, and yields its test accuracy."""
    model = StridedNet(partial(BatchNorm, momentum=0.9), config.pick((16, 32, 64), (4, 8), full=(64, 128, 256)))
    steps = config.pick(480, 4, full=5_000)
    optimizer = optax.chain(optax.adam(optax.cosine_decay_schedule(0.01, steps)), only(setting))
    options = dict(steps=steps, every=-(-steps // 8), batch_size=50, seed=seed)
    for _, line in study.train(model, optimizer, embedded_digits(), **options):
        yield line


def accuracy(setting: str) -> Measure:
    """Returns a measure: the test accuracy at the end in %."""
    return of(setting, "accuracy", lambda values: 100 * values[-1])


CLAIMS = (
    Claim("Scale and bias learn more than two weights of each kernel", accuracy(ONLY_BN), ">", accuracy(TWO_WEIGHTS)),
    Claim("Scale and bias learn more than the output layer", accuracy(ONLY_BN), ">", accuracy(OUTPUT)),
    Claim("All parameters learn more than scale and bias", accuracy(ALL), ">", accuracy(ONLY_BN)),
)
DISTANCE = (
    "a CNN of three layers on 4,000 digits instead of ResNets on CIFAR-10; depth and width, which "
    "the paper finds to matter, do not vary, and the two weights are the first ones, not random ones."
)


def table(lines: list[study.Line]) -> str:
    """Makes a table of the test accuracy at the end."""
    text = ["| what trains | test accuracy, % |", "|---|---|"]
    for setting in SETTINGS:
        found = 100 * study.curves(lines, setting, "step", "accuracy")[1][:, -1]
        text.append(f"| {setting} | {study.spread(found, 2)} |")
    return "\n".join(text)


def draw(lines: list[study.Line], figure: Figure) -> None:
    """Draws the test accuracy by step, mean and range over the seeds."""
    axes = figure.subplots()
    for setting in SETTINGS:
        steps, found = study.curves(lines, setting, "step", "accuracy")
        study.band(axes, steps, 100 * found, label=setting, marker=".")
    axes.set(xlabel="training step", ylabel="test accuracy, %")
    study.below(axes, title="what trains")


STUDY = study.Study("only_bn", SETTINGS, trial, table, draw, size=(7, 5), claims=CLAIMS, distance=DISTANCE)

if __name__ == "__main__":
    study.run(STUDY, __doc__, RESULTS)
