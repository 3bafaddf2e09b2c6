"""Fashion-MNIST corrupted in ten ways: the statistics of training, those of the corrupted images, and Tent.

Claim:    A BN network errs less on corrupted images with their own statistics, and with Tent still less.
Command:  python -m experiments.repro.schneider2020              # --smoke: seconds, on digits
Hardware: 1 CPU core
Time:     6 min of one core

Schneider et al. 2020, https://arxiv.org/abs/2006.16971: a ResNet-50 on ImageNet-C has a mean corruption error of
62.2 % with the statistics of the corrupted images (`bnjax.tools.adapt_statistics`), and 76.7 % with those of training
(https://proceedings.neurips.cc/paper/2020/hash/85690f81aadc1749175c187784afc9ee-Abstract.html); few images do too
where the old statistics count as a number N of images beside them. Wang et al. 2021,
https://arxiv.org/abs/2006.10726: Tent also takes a step on scale and bias with each batch, so that the entropy of the
predictions falls (`bnjax.tools.tent`). Here a ConvNet of three blocks and those of `experiments.data.corruptions`;
Tent with Adam at 0.001 and 20 batches of 100, from the trained network anew for each corruption and strength.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure

from bnjax.linen import BatchNorm
from bnjax.tools import adapt_statistics, entropy, tent
from experiments.data.corruptions import CORRUPTIONS, STRENGTHS, corrupt
from experiments.data.images import Labelled
from experiments.models.convolutional import ConvNet
from experiments.repro import study
from experiments.repro.claims import Claim, Measure

SETTING, CLEAN, BATCH = "ConvNet with BN", "none", 100
SIZES, PRIORS, MIDDLE, FEW = (1, 5, 20, 100), (0, 16), 3, 5  # errors by batch size: on 1/FEW of the images
Predict = Callable[[Any, jax.Array], jax.Array]  # (variables, images [B, n, 28, 28, 1]) -> logits [B, n, 10]


def source(model: nn.Module) -> Predict:
    """Builds predictions with the statistics of training."""
    return jax.vmap(partial(model.apply, train=False), (None, 0))


def adapted(model: nn.Module, prior: int = 0) -> Predict:
    """Builds predictions in which each batch uses its own statistics, mixed with those of training as
    `prior` images.
    """

    def predict(variables: Any, x: jax.Array) -> jax.Array:
        apply_fn = partial(model.apply, train=False, mutable=["batch_stats"])
        mixed = adapt_statistics(apply_fn, variables, x, prior=prior)
        return model.apply(mixed, x, train=False)

    return jax.vmap(predict, (None, 0))


def tented(model: nn.Module) -> Predict:
    """Builds predictions in which each batch uses its own statistics, followed by a step of Tent."""

    def predict(variables: Any, batches: jax.Array) -> jax.Array:
        stats = variables["batch_stats"]
        optimizer = tent(optax.adam(1e-3), variables["params"], stats)

        def objective(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits, _ = model.apply({"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"])
            return entropy(logits).mean(), logits

        def step(state: Any, x: jax.Array) -> tuple[Any, jax.Array]:
            params, opt_state = state
            grads, logits = jax.grad(objective, has_aux=True)(params, x)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), logits

        return jax.lax.scan(step, (variables["params"], optimizer.init(variables["params"])), batches)[1]

    return predict


METHODS = {"statistics of training": source, "adapted statistics": adapted, "Tent": tented}


def trial(setting: str, seed: int, config: study.Config) -> Iterator[study.Line]:
    """Trains once, then yields the error of each method by corruption and strength, and by batch size."""
    data, model = (
        study.pictures(config),
        ConvNet(partial(BatchNorm, momentum=0.9), widths=config.pick((8, 16, 32), (4, 4), (16, 32, 64))),
    )
    steps, images = config.pick(800, 60, full=6_000), config.pick(2_000, 200, full=10_000)
    options = dict(steps=steps, every=steps // 4, batch_size=100, seed=seed)
    for state, line in study.train(model, optax.adam(1e-3), data, **options):  # noqa: B007
        yield line
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    test = Labelled(*(part[:images] for part in data.test))
    changed = {name: [corrupt(test.images, name, k) for k in STRENGTHS] for name in CORRUPTIONS}
    for method, build in METHODS.items():
        measure = errors(build(model), variables, test.labels, BATCH)
        for name, versions in {CLEAN: [test.images], **changed}.items():
            found = [measure(version) for version in versions]
            yield {"kind": "error", "method": method, "corruption": name, "error": found}
    few = images // FEW
    for prior, size in product(PRIORS, config.pick(SIZES, SIZES[2:3])):
        measure = errors(adapted(model, prior), variables, test.labels[:few], size)
        found = [measure(versions[MIDDLE - 1][:few]) for versions in changed.values()]
        yield {"kind": "size", "prior": prior, "size": size, "mean_error": 100 * np.mean(found)}


def errors(predict: Predict, variables: Any, labels: np.ndarray, size: int) -> Callable[[np.ndarray], float]:
    """Returns `measure(images)`, which computes the fraction of wrong predictions in batches of `size` images."""

    @jax.jit
    def wrong(batches: jax.Array) -> jax.Array:
        logits = predict(variables, batches.astype(jnp.float32) / 255)
        return (logits.argmax(-1).ravel() != labels).mean()

    return lambda images: float(wrong(images.reshape(-1, size, *images.shape[1:])))


def table(lines: list[study.Line]) -> str:
    """Makes a table of errors in %, averaged over the strengths."""
    text = [f"| error, % | {' | '.join(METHODS)} |", "|---" * (1 + len(METHODS)) + "|"]
    for name in (CLEAN, *CORRUPTIONS):
        text.append(f"| {name} | {' | '.join(study.spread(mean_error(lines, m, [name]), 1) for m in METHODS)} |")
    means = [study.spread(mean_error(lines, method, CORRUPTIONS), 1) for method in METHODS]
    return "\n".join([*text, f"| mean of the {len(CORRUPTIONS)} | {' | '.join(means)} |"])


def mean_error(lines: list[study.Line], method: str, names: Any, strengths: slice = slice(None)) -> np.ndarray:
    """Returns the error in % for each seed, averaged over corruptions and strengths."""
    here = [line for line in lines if line.get("method") == method and line["corruption"] in names]
    seeds = sorted({line["seed"] for line in here})
    return np.array(
        [100 * np.mean([line["error"][strengths] for line in here if line["seed"] == seed]) for seed in seeds]
    )


def draw(lines: list[study.Line], figure: Figure) -> None:
    """Draws the errors of each method by corruption, and by batch size."""
    by_kind, by_size = figure.subplots(1, 2, width_ratios=(3, 1))
    names = (CLEAN, *CORRUPTIONS)
    for i, method in enumerate(METHODS):
        found = np.array([mean_error(lines, method, [name]) for name in names])
        by_kind.bar(
            np.arange(len(names)) + (i - 1) * 0.27, found.mean(1), 0.27, yerr=study.deviation(found.T), label=method
        )
    by_kind.set(ylabel="error, %, mean of five strengths", xticks=range(len(names)))
    by_kind.set_xticklabels(names, rotation=35, ha="right")
    by_kind.legend(ncols=len(METHODS), loc="lower center", bbox_to_anchor=(0.5, 1))
    for prior, look in zip(PRIORS, ("o-", "s--"), strict=True):
        here = [line for line in lines if line.get("prior") == prior]
        style = dict(label=f"with N = {prior}", marker=look[0], ls=look[1:])
        study.band(by_size, *study.curves(here, SETTING, "size", "mean_error"), **style)
    middle = mean_error(lines, "statistics of training", CORRUPTIONS, slice(MIDDLE - 1, MIDDLE))
    by_size.axhline(middle.mean(), color="grey", ls=":", label="none (all images)")
    by_size.set(xscale="log", xlabel="images in a batch", ylabel=f"error, %, mean of corruptions at strength {MIDDLE}")
    by_size.set_ylim(bottom=0)
    study.below(by_size, title="adaptation")


def mean_over_corruptions(method: str) -> Measure:
    """Returns a measure: the error in %, averaged over corruptions and strengths."""
    return lambda lines: float(mean_error(lines, method, CORRUPTIONS).mean())


def of_size(prior: int, size: int) -> Measure:
    """Returns a measure: the error in % with statistics of batches of this size, the old ones worth `prior` images."""
    chosen = {"prior": prior, "size": size}
    return lambda lines: float(np.mean([x["mean_error"] for x in lines if chosen.items() <= x.items()] or [np.nan]))


TRAINING, ADAPTED, TENT = map(mean_over_corruptions, METHODS)
CLAIMS = (
    Claim("Statistics of the corrupted images lower the error, %", ADAPTED, "<", TRAINING),
    Claim("Tent lowers it further", TENT, "<", ADAPTED),
    *(
        Claim(f"Of {n} images: 16 old ones beside them lower the error", of_size(16, n), "<", of_size(0, n))
        for n in (1, 5)
    ),
)
DISTANCE = (
    "the plain error of a CNN on ten corruptions of our own of Fashion-MNIST instead of ResNet-50 on ImageNet-C, "
    "whose mCE weighs each corruption by AlexNet's error; the network is trained for 800 steps."
)
STUDY = study.Study("schneider2020", (SETTING,), trial, table, draw, size=(12, 4.5), claims=CLAIMS, distance=DISTANCE)

if __name__ == "__main__":
    study.run(STUDY, __doc__)
