"""Does BN overfit? Few digits, wrong labels and several batch sizes, with BN, without, and with noisier statistics.

Claim:    The noise of a batch's statistics regularises: the gap shrinks with smaller batches, ghost batches, or noise.
Command:  python -m experiments.repro.luo2019                     # --smoke: seconds
Hardware: 2 CPU cores
Time:     4 min of one core

Luo, Wang, Shao & Peng 2019, https://arxiv.org/abs/1809.00846, sections 3 and 5 (there networks on CIFAR-10); ghost
batches after Hoffer 2017 and Summers & Dinneen 2020, https://arxiv.org/abs/1906.03548. Two times Dense → norm → ReLU
and a Dense layer on 1,000 digits, tested on 4,000 others. "Wrong labels": 40 % of the training labels change places.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure

from bnjax.linen import BatchNorm, GhostBatchNorm
from experiments.data.images import Labelled, Splits, embedded_digits, stratified_split
from experiments.models.convolutional import Norm, Unnormalised
from experiments.repro import study
from experiments.repro.claims import Claim, Measure, of

ROWS, BATCH, WRONG = 10, 100, 0.4
BATCHES = (20, 100, 250)
KINDS = {"wrong": "1,000 digits, wrong labels", "few": "200 digits"}


class NoisyBatchNorm(nn.Module):
    """Normalizes by the statistics of the whole batch, with noise like that of statistics over `ROWS` Gaussian rows."""

    use_running_average: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        xhat = BatchNorm(self.use_running_average, momentum=0.9, use_scale=False, use_bias=False)(x)
        if not self.use_running_average:
            mean, var = jax.random.split(self.make_rng("dropout"))
            shift = jax.random.normal(mean, x.shape[-1:]) / ROWS**0.5
            xhat = (xhat - shift) / jnp.sqrt(jax.random.chisquare(var, ROWS - 1, shape=x.shape[-1:]) / ROWS)
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        return xhat * scale + self.param("bias", nn.initializers.zeros, x.shape[-1:])


NORMS = {
    "without": Unnormalised,
    "BN": partial(BatchNorm, momentum=0.9),
    "ghost BN": partial(GhostBatchNorm, virtual_batch_size=ROWS, momentum=0.9),
    "BN + noise": NoisyBatchNorm,
}


class Trained(NamedTuple):
    """Options of one training: the norm, the kind of training set, and the batch size."""

    norm: str
    kind: str
    batch: int = BATCH

    def __str__(self) -> str:
        return f"{self.norm}, {KINDS[self.kind]}" + (f", batches of {self.batch}" if self.batch != BATCH else "")


BY_KIND = [Trained(norm, kind) for kind in KINDS for norm in NORMS]
BY_BATCH = [Trained(norm, "wrong", batch) for norm in ("without", "BN") for batch in BATCHES if batch != BATCH]
SETTINGS = {str(setting): setting for setting in BY_KIND + BY_BATCH}


class MLP(nn.Module):
    """Two times Dense → norm → ReLU, and a Dense layer for the logits."""

    norm: Norm
    width: int

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Computes logits `[N, 10]` from float images `[N, 28, 28, 1]`."""
        x = images.reshape(len(images), -1)
        for _ in range(2):
            x = nn.relu(self.norm(use_running_average=not train)(nn.Dense(self.width)(x)))
        return nn.Dense(10)(x)


def digits(kind: str) -> Splits:
    """Returns the training set of this kind, 1,000 or 200 of the embedded digits, and 4,000 others for testing."""
    others, train = embedded_digits()
    if kind == "few":
        train = stratified_split(train, 20).test
    if kind == "wrong":
        rng, labels = np.random.default_rng(0), train.labels.copy()
        rows = rng.permutation(len(labels))[: round(WRONG * len(labels))]
        labels[rows] = labels[rng.permutation(rows)]
        train = Labelled(train.images, labels)
    return Splits(train, others)


def trial(setting: str, seed: int, config: study.Config) -> Iterator[study.Line]:
    """Trains one setting; yields accuracy on the test digits, and on the training digits with their given labels.

    All are in evaluation mode. The rate is proportional to the batch, so that the noise of the gradient stays about the
    same while that of the statistics changes. The number of epochs is that of batches of 100.
    """
    norm, kind, batch = SETTINGS[setting]
    data, model = digits(kind), MLP(NORMS[norm], config.pick(128, 8, full=1_024))
    steps, every = ((config.pick(*sizes) * BATCH) // batch for sizes in ((400, 20, 6_000), (20, 10, 200)))
    score = study.scorer(model)
    options = dict(steps=steps, every=every, batch_size=batch, seed=seed)
    for state, line in study.train(model, optax.sgd(0.1 * batch / BATCH, momentum=0.9), data, **options):
        found = score(state, data.train)
        yield {**line, "shown": line["step"] * batch, "fitted": found["accuracy"], "fitted_loss": found["loss"]}


def ends(lines: list[study.Line], setting: str) -> dict[str, np.ndarray]:
    """Returns, for every seed, fitted training labels and test accuracy at the end, the best test accuracy, and two
    gaps.
    """
    last = {
        name: study.curves(lines, setting, "step", name)[1]
        for name in ("fitted", "accuracy", "test_loss", "fitted_loss")
    }
    return {
        "training labels fitted, %": 100 * last["fitted"][:, -1],
        "test accuracy, %": 100 * last["accuracy"][:, -1],
        "best on the way, %": 100 * last["accuracy"].max(1),
        "lost since, %": 100 * (last["accuracy"].max(1) - last["accuracy"][:, -1]),
        "gap of the loss": (last["test_loss"] - last["fitted_loss"])[:, -1],
    }


def table(lines: list[study.Line]) -> str:
    """Makes a table of what each setting has overfitted at its end."""
    found = {setting: ends(lines, setting) for setting in SETTINGS}
    names = list(next(iter(found.values())))
    text = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    text += [f"| {setting} | {' | '.join(study.spread(found[setting][n], 2) for n in names)} |" for setting in SETTINGS]
    return "\n".join(text)


def draw(lines: list[study.Line], figure: Figure) -> None:
    """Draws test accuracy of each norm with wrong labels and with few digits, and final accuracy by batch size."""
    *by_pass, by_batch = figure.subplots(1, len(KINDS) + 1)
    for axes, kind in zip(by_pass, KINDS, strict=True):
        for norm in NORMS:
            examples, accuracy = study.curves(lines, str(Trained(norm, kind)), "shown", "accuracy")
            study.band(axes, examples / 1_000, 100 * accuracy, label=norm)
        axes.set(title=KINDS[kind], xlabel="digits shown, thousands", ylabel="test accuracy, %")
    for norm in ("without", "BN"):
        for name, style in (("best on the way, %", "--"), ("test accuracy, %", "-")):
            values = [ends(lines, str(Trained(norm, "wrong", batch)))[name] for batch in BATCHES]
            label = f"{norm}, {'at the end' if style == '-' else 'best on the way'}"
            study.band(
                by_batch,
                np.array(BATCHES),
                np.array(values).T,
                label=label,
                color=f"C{list(NORMS).index(norm)}",
                ls=style,
                marker="o",
            )
    by_batch.set(title=KINDS["wrong"], xlabel="batch", ylabel="test accuracy, %", xscale="log")
    by_batch.set_xticks(BATCHES, [str(batch) for batch in BATCHES])
    by_batch.minorticks_off()
    for axes in (*by_pass, by_batch):
        study.below(axes)
    low, high = zip(*(axes.get_ylim() for axes in (by_pass[0], by_batch)), strict=True)
    for axes in (by_pass[0], by_batch):  # both of wrong labels
        axes.set_ylim(min(low), max(high))


def lost(norm: str, batch: int = BATCH) -> Measure:
    """Returns a measure: the test accuracy in % that was lost since the best evaluation, with wrong labels."""
    return of(str(Trained(norm, "wrong", batch)), "accuracy", lambda values: 100 * (values.max() - values[-1]))


def on_few(norm: str) -> Measure:
    """Returns a measure: the test accuracy in % after training on 200 digits."""
    return of(str(Trained(norm, "few")), "accuracy", lambda values: 100 * values[-1])


CLAIMS = (
    Claim("On wrong labels BN loses less than no BN", lost("BN"), "<", lost("without")),
    Claim("Ghost BN loses less than BN", lost("ghost BN"), "<", lost("BN")),
    Claim("BN with noise loses less than BN", lost("BN + noise"), "<", lost("BN")),
    Claim("BN of 20 loses less than BN of 250", lost("BN", 20), "<", lost("BN", 250)),
    Claim("On 200 digits BN is more accurate than no BN", on_few("BN"), ">", on_few("without")),
    Claim("On 200 digits ghost BN is more accurate than BN", on_few("ghost BN"), ">", on_few("BN")),
)
DISTANCE = (
    "two layers of 128 on 1,000 digits instead of networks on CIFAR-10 and ImageNet; the noise is drawn, not that "
    "of a batch."
)
STUDY = study.Study("luo2019", tuple(SETTINGS), trial, table, draw, size=(13, 5), claims=CLAIMS, distance=DISTANCE)

if __name__ == "__main__":
    study.run(STUDY, __doc__)
