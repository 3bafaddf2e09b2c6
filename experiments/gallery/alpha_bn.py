"""Statistics mixed at test time (α-BN): how much of the batch's own, by the size of the batch and the corruption.

Claim:    The smaller a batch of corrupted images, the less its own statistics should count: alone they harm one image
          and help 64, and a mixture is better than either for a few.
Command:  python -m experiments.gallery.alpha_bn                # --smoke: seconds
Hardware: 1 CPU core
Time:     3 min

You, Li & Zhao 2021, https://arxiv.org/abs/2110.04065 (α-BN), and Schneider et al. 2020,
https://arxiv.org/abs/2006.16971, who count the old statistics as N images: α = n/(N + n) is the weight of the n images
met now (`bnjax.tools.adapt_statistics(..., prior=N)`). A CNN trained on clean digits, and 500 test digits corrupted in
ten ways (`experiments.data.corruptions`, strength 3).
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure

from bnjax.linen import BatchNorm
from bnjax.tools import adapt_statistics
from experiments.data.corruptions import CORRUPTIONS, corrupt
from experiments.data.images import embedded_digits
from experiments.gallery import RESULTS
from experiments.models.convolutional import StridedNet
from experiments.repro import study
from experiments.repro.claims import Claim, Measure

SETTING, SIZES, ALPHAS, STRENGTH = "StridedNet on clean digits", (1, 4, 16, 64), (0.0, 0.1, 0.25, 0.5, 0.75, 1.0), 3


def predictions(model: nn.Module, alpha: float) -> Any:
    """Returns a jitted function from variables and batches `[B, n, 28, 28, 1]` to classes `[B, n]`."""

    def predict(variables: Any, x: jax.Array) -> jax.Array:
        if alpha:
            apply_fn = partial(model.apply, train=False, mutable=["batch_stats"])
            variables = adapt_statistics(apply_fn, variables, x, prior=len(x) * (1 - alpha) / alpha)
        return model.apply(variables, x, train=False).argmax(-1)

    return jax.jit(jax.vmap(predict, (None, 0)))


def trial(setting: str, seed: int, config: study.Config) -> Iterator[study.Line]:
    """Trains once; yields the error of every batch size and α, by corruption."""
    data, steps = embedded_digits(), config.pick(480, 8)
    model = StridedNet(partial(BatchNorm, momentum=0.9), config.pick((8, 16, 32), (2, 4)))
    options = dict(steps=steps, every=steps, batch_size=50, seed=seed)
    for state, line in study.train(model, optax.adam(optax.cosine_decay_schedule(0.01, steps)), data, **options):  # noqa: B007
        yield line
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    rows = np.random.default_rng(seed).permutation(len(data.test.labels))[: config.pick(512, 64)]
    images = {name: corrupt(data.test.images[rows], name, STRENGTH) / np.float32(255) for name in CORRUPTIONS}
    for alpha in ALPHAS:
        predict = predictions(model, alpha)
        for size in SIZES:
            batched = {name: jnp.asarray(x.reshape(-1, size, 28, 28, 1)) for name, x in images.items()}
            wrong = {n: np.asarray(predict(variables, x)).ravel() != data.test.labels[rows] for n, x in batched.items()}
            found = {name: 100 * float(each.mean()) for name, each in wrong.items()}
            yield {"kind": "error", "alpha": alpha, "size": size, "error": found}


def error(size: int, alpha: float) -> Measure:
    """Returns a measure: the error in %, averaged over the corruptions."""
    chosen = {"size": size, "alpha": alpha}
    return lambda lines: float(np.mean(list(next(x["error"] for x in lines if chosen.items() <= x.items()).values())))


CLAIMS = (
    Claim("Of 64 images the own statistics err less than those of training", error(64, 1.0), "<", error(64, 0.0)),
    Claim("Of one image they err more", error(1, 1.0), ">", error(1, 0.0)),
    Claim("Of one image a quarter of them errs less than none", error(1, 0.25), "<", error(1, 0.0)),
    Claim("Of 4 images half of them errs less than none", error(4, 0.5), "<", error(4, 0.0)),
    Claim("Of 4 images half of them errs less than all", error(4, 0.5), "<", error(4, 1.0)),
)
DISTANCE = "a CNN of three layers on corrupted digits instead of ResNet-50 on ImageNet-C; α is the same for all layers."


def by_seed(lines: list[study.Line], size: int, alpha: float) -> list[float]:
    """Returns the error in % for every seed."""
    seeds = sorted({line["seed"] for line in lines})
    return [error(size, alpha)([line for line in lines if line["seed"] == seed]) for seed in seeds]


def table(lines: list[study.Line]) -> str:
    """Makes a table of the error by batch size and α."""
    text = [f"| error, % | {' | '.join(f'α = {alpha:g}' for alpha in ALPHAS)} |", "|---" * (len(ALPHAS) + 1) + "|"]
    for size in SIZES:
        cells = [study.spread(by_seed(lines, size, alpha), 1) for alpha in ALPHAS]
        text.append(f"| {size} image{'s' * (size > 1)} | {' | '.join(cells)} |")
    return "\n".join(text)


def draw(lines: list[study.Line], figure: Figure) -> None:
    """Draws the mean error by α for each batch size, and the best α by corruption."""
    by_alpha, by_kind = figure.subplots(1, 2)
    for i, size in enumerate(SIZES):
        found = np.array([by_seed(lines, size, alpha) for alpha in ALPHAS]).T
        study.band(by_alpha, np.array(ALPHAS), found, label=f"{size} image{'s' * (size > 1)}", marker="o")
        here = [line for line in lines if line.get("size") == size]
        mean = {a: {n: np.mean([x["error"][n] for x in here if x["alpha"] == a]) for n in CORRUPTIONS} for a in ALPHAS}
        best = [min(ALPHAS, key=lambda a: mean[a][name]) for name in CORRUPTIONS]
        by_kind.plot(np.arange(len(CORRUPTIONS)) + 0.12 * (i - 1.5), best, "o", color=f"C{i}")
    by_alpha.set(xlabel="α, the weight of the batch's own statistics", ylabel="error, %, mean of the corruptions")
    by_kind.set(ylabel="α with the least error, mean of the seeds", xticks=range(len(CORRUPTIONS)))
    by_kind.set_xticklabels(CORRUPTIONS, rotation=35, ha="right")
    figure.legend(*by_alpha.get_legend_handles_labels(), loc="outside lower center", ncols=len(SIZES))


STUDY = study.Study("alpha_bn", (SETTING,), trial, table, draw, size=(11, 5), claims=CLAIMS, distance=DISTANCE)

if __name__ == "__main__":
    study.run(STUDY, __doc__, RESULTS)
