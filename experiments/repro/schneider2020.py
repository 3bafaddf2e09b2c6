"""Fashion-MNIST corrupted in ten ways: the statistics of training, those of the corrupted images, and Tent.

Claim:    A BN network errs less on corrupted images with their own statistics, and with Tent still less.
Command:  python -m experiments.repro.schneider2020              # --smoke: seconds, on digits
Hardware: 1 CPU core
Time:     5 min of one core

Schneider et al. 2020, https://arxiv.org/abs/2006.16971: a ResNet-50 on ImageNet-C has a mean corruption error of
62.2 % with the statistics of the corrupted images (`bnjax.tools.adapt_statistics`), and 76.7 % with those of training
(https://proceedings.neurips.cc/paper/2020/hash/85690f81aadc1749175c187784afc9ee-Abstract.html); few images do too
where the old statistics count as a number N of images beside them. Wang et al. 2021,
https://arxiv.org/abs/2006.10726: Tent also takes a step on scale and bias with each batch, so that the entropy of the
predictions falls (`bnjax.tools.tent`). Here a CNN of three layers and the corruptions of
`experiments.data.corruptions`; batches of 200, and Tent from the trained network anew for each corruption and strength,
at the rates of its authors' program for CIFAR-10-C (Adam at 0.001, batches of 200:
https://github.com/DequanWang/tent, cfgs/tent.yaml) and of that for ImageNet-C which EATA's authors compare with (SGD at
0.00025 with momentum 0.9, batches of 64: https://github.com/mr-eggplant/EATA, main.py).
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
from experiments.data.corruptions import CORRUPTIONS, corrupt
from experiments.data.images import Labelled
from experiments.models.convolutional import StridedNet
from experiments.repro import study
from experiments.repro.claims import Claim, Measure

SETTING, CLEAN, BATCH, STRENGTHS = "StridedNet with BN", "none", 200, (1, 3, 5)
SIZES, PRIORS, MIDDLE = (1, 5, 20, 100), (0, 16), 3  # of the errors by batch size
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


def tented(inner: optax.GradientTransformation, model: nn.Module) -> Predict:
    """Builds predictions in which each batch uses its own statistics, followed by a step of Tent."""

    def predict(variables: Any, batches: jax.Array) -> jax.Array:
        stats = variables["batch_stats"]
        optimizer = tent(inner, variables["params"], stats)

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


METHODS: dict[str, Callable[[nn.Module], Predict]] = {
    "statistics of training": source,
    "adapted statistics": adapted,
    "Tent, Adam 0.001": partial(tented, optax.adam(1e-3)),
    "Tent, SGD 0.00025": partial(tented, optax.sgd(2.5e-4, momentum=0.9)),
}


def trial(setting: str, seed: int, config: study.Config) -> Iterator[study.Line]:
    """Trains once, then yields the error of each method by corruption and strength, and by batch size."""
    data, widths = study.pictures(config), config.pick((8, 16, 32), (4, 4), (16, 32, 64))
    model = StridedNet(partial(BatchNorm, momentum=0.9), widths)
    steps, images, few = config.pick((800, 4_000, 400), (60, 200, 200), full=(6_000, 10_000, 2_000))
    options = dict(steps=steps, every=steps // 4, batch_size=100, seed=seed)
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, steps))
    for state, line in study.train(model, optimizer, data, **options):  # noqa: B007
        yield line
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    test = Labelled(*(part[:images] for part in data.test))
    changed = {name: [corrupt(test.images, name, k) for k in STRENGTHS] for name in CORRUPTIONS}
    for method, build in METHODS.items():
        measure = errors(build(model), variables, test.labels, BATCH)
        for name, versions in {CLEAN: [test.images], **changed}.items():
            found = [measure(version) for version in versions]
            yield {"kind": "error", "method": method, "corruption": name, "error": found}
    for prior, size in product(PRIORS, config.pick(SIZES, SIZES[2:3])):
        measure = errors(adapted(model, prior), variables, test.labels[:few], size)
        found = [measure(versions[STRENGTHS.index(MIDDLE)][:few]) for versions in changed.values()]
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
            np.arange(len(names)) + (i - 1.5) * 0.2, found.mean(1), 0.2, yerr=study.deviation(found.T), label=method
        )
    by_kind.set(ylabel="error, %, mean of three strengths", xticks=range(len(names)))
    by_kind.set_xticklabels(names, rotation=35, ha="right")
    by_kind.legend(ncols=len(METHODS), loc="lower center", bbox_to_anchor=(0.5, 1))
    for prior, look in zip(PRIORS, ("o-", "s--"), strict=True):
        here = [line for line in lines if line.get("prior") == prior]
        style = dict(label=f"with N = {prior}", marker=look[0], ls=look[1:])
        study.band(by_size, *study.curves(here, SETTING, "size", "mean_error"), **style)
    middle = mean_error(lines, "statistics of training", CORRUPTIONS, slice(at := STRENGTHS.index(MIDDLE), at + 1))
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


TRAINING, ADAPTED, *TENTS = map(mean_over_corruptions, METHODS)
CLAIMS = (
    Claim("Statistics of the corrupted images lower the error, %", ADAPTED, "<", TRAINING),
    *(Claim(f"{name} lowers it further", a, "<", ADAPTED) for name, a in zip(list(METHODS)[2:], TENTS, strict=True)),
    *(
        Claim(
            f"Of {n} image{'s' * (n > 1)}: 16 old ones beside them lower the error", of_size(16, n), "<", of_size(0, n)
        )
        for n in (1, 5)
    ),
)
DISTANCE = (
    "the plain error of a CNN on ten corruptions of our own of Fashion-MNIST instead of ResNet-50 on ImageNet-C, "
    "whose mCE weighs each corruption by AlexNet's error; Tent takes 20 steps for each corruption and strength, "
    "and 50 in its authors' program."
)
STUDY = study.Study("schneider2020", (SETTING,), trial, table, draw, size=(12, 4.5), claims=CLAIMS, distance=DISTANCE)

if __name__ == "__main__":
    study.run(STUDY, __doc__)
