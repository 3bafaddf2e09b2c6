"""Samples of a conditional GAN with running averages, with statistics of the batch, and with standing statistics.

Claim:    Standing statistics give samples nearer to real digits than running averages do; statistics of the batch harm
          where a batch is small or of one class.
Command:  python -m experiments.gallery.gan                     # --smoke: seconds; --full: ten times the steps
Hardware: 1 CPU core
Time:     4 min

Brock et al. 2019, https://arxiv.org/abs/1809.11096 (BigGAN): a generator with conditional BN, whose scale and bias
depend on the class, and for sampling statistics taken in forward passes over noise of its own instead of running
averages. The number of passes, 32, stands in the authors' script (https://github.com/ajbrock/BigGAN-PyTorch,
scripts/sample_BigGAN_bs256x8.sh). `bnjax.tools.recalibrate` takes them as of one batch of all rows.

One training gives one generator, whose samples are compared, always of the same noise and classes. A network that was
trained to read digits tells how many samples are of the class asked for, and how far their distribution is from that of
held-back digits: the Fréchet distance of Gaussians fitted to 32 of its features (Heusel et al. 2017,
https://arxiv.org/abs/1706.08500, with Inception's features). Digits have 14×14 pixels.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure

from bnjax import tools
from bnjax.linen import BatchNorm
from experiments.data.images import CLASSES, Labelled, Splits, embedded_digits
from experiments.gallery import RESULTS
from experiments.models.conditional_gan import Discriminator, Generator
from experiments.models.convolutional import StridedNet
from experiments.repro import study
from experiments.repro.claims import Claim, Measure

SETTING, NOISE, BATCH, PASSES, SIDE = "conditional GAN", 32, 64, 32, 14
SIZES, EACH = (1, 2, 4, 16, 64), 128  # images of a batch that is sampled, and samples of each class
STANDING, RUNNING = "standing statistics", "running averages"
MIXED, ONE = "batch of all classes", "batch of one class"


class Reader(nn.Module):
    """Reads digits; its features are those before the last layer."""

    def setup(self) -> None:
        self.body = StridedNet(partial(BatchNorm, momentum=0.9), (16, 32), classes=32)
        self.head = nn.Dense(CLASSES)

    def features(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Computes features `[N, 32]`."""
        return nn.relu(self.body(images, train=train))

    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Computes logits `[N, 10]`."""
        return self.head(self.features(images, train))


class Players(NamedTuple):
    """What a step of the training changes."""

    generator: Any  # params
    batch_stats: Any  # of the generator
    discriminator: Any
    states: Any  # of the two optimizers


@cache
def digits() -> Splits:
    """Returns the digits of 14×14 pixels, means of four."""

    def small(images: np.ndarray) -> np.ndarray:
        return images.reshape(-1, SIDE, 2, SIDE, 2, 1).mean((2, 4)).round().astype(np.uint8)

    return Splits(*(Labelled(small(part.images), part.labels) for part in embedded_digits()))


@cache
def reader(steps: int) -> Callable[[str, jax.Array], np.ndarray]:
    """Trains the network that judges samples, once for all seeds; returns `read(method, images)`."""
    model, example = Reader(), (np.zeros((1, SIDE, SIDE, 1), np.float32),)
    options = dict(steps=steps, every=steps, batch_size=50, seed=0, example=example)
    ((state, _),) = study.train(model, optax.adam(3e-3), digits(), **options)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits, features = jax.jit(partial(model.apply, train=False)), jax.jit(partial(model.apply, method="features"))
    programs = {"logits": logits, "features": features}
    return lambda what, images: np.asarray(programs[what](variables, images), np.float64)


def train(model: Generator, seed: int, steps: int) -> Any:
    """Trains a generator against a discriminator; returns its variables."""
    images, labels = digits().train.images / np.float32(255), digits().train.labels
    judge, optimizer, rng = Discriminator(), optax.adam(1e-3, b1=0.5), np.random.default_rng(seed)
    keys = jax.random.split(jax.random.key(seed), 2 + steps)

    def both(params: Any, real: jax.Array, made: jax.Array, labels: jax.Array) -> jax.Array:
        """Computes the loss of the discriminator."""
        return (nn.softplus(-judge.apply(params, real, labels)) + nn.softplus(judge.apply(params, made, labels))).mean()

    @jax.jit
    def step(now: Players, real: jax.Array, labels: jax.Array, key: jax.Array) -> Players:
        """Takes a step of the discriminator, then one of the generator, on the same noise."""
        noise = jax.random.normal(key, (len(real), NOISE))

        def made(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": now.batch_stats}
            return model.apply(variables, noise, labels, True, mutable=["batch_stats"])

        grads = jax.grad(both)(now.discriminator, real, made(now.generator)[0], labels)
        change, second = optimizer.update(grads, now.states[1])
        discriminator = optax.apply_updates(now.discriminator, change)

        def loss(params: Any) -> tuple[jax.Array, Any]:
            images, updates = made(params)
            return nn.softplus(-judge.apply(discriminator, images, labels)).mean(), updates["batch_stats"]

        grads, stats = jax.grad(loss, has_aux=True)(now.generator)
        change, first = optimizer.update(grads, now.states[0])
        return Players(optax.apply_updates(now.generator, change), stats, discriminator, (first, second))

    start = model.init(keys[0], jnp.zeros((1, NOISE)), labels[:1], False)
    judging = judge.init(keys[1], images[:1], labels[:1])
    states = optimizer.init(start["params"]), optimizer.init(judging)
    players = Players(start["params"], start["batch_stats"], judging, states)
    for key in keys[2:]:  # no scan: XLA's convolutions are slow inside of loops on CPUs
        rows = rng.integers(0, len(labels), BATCH)
        players = step(players, images[rows], labels[rows], key)
    return {"params": players.generator, "batch_stats": players.batch_stats}


def standing(model: Generator, variables: Any, seed: int, passes: int) -> Any:
    """Returns the generator's variables with statistics of passes over noise and classes drawn at random."""
    rng = np.random.default_rng([seed, 1])
    draws = ((rng.standard_normal((BATCH, NOISE), np.float32), rng.integers(0, CLASSES, BATCH)) for _ in range(passes))
    apply_fn = lambda variables, batch: model.apply(variables, *batch, False, mutable=["batch_stats"])  # noqa: E731
    return tools.recalibrate(apply_fn, variables, draws, progress=False)


def in_batches(model: Generator, variables: Any, noise: jax.Array, labels: jax.Array) -> jax.Array:
    """Generates images `[batches, size, 14, 14, 1]`, each batch with its own statistics."""
    run = partial(model.apply, variables, train=True, mutable=["batch_stats"])
    return jax.jit(jax.vmap(lambda *batch: run(*batch)[0]))(noise, labels)


def trial(setting: str, seed: int, config: study.Config) -> Iterator[study.Line]:
    """Trains one generator; yields how good its samples are with each kind of statistics."""
    read, test = reader(config.pick(400, 8)), digits().test.images / np.float32(255)
    model, each = Generator(config.pick(32, 4)), config.pick(EACH, 64)
    variables = train(model, seed, config.pick(1_400, 8, full=14_000))
    noise = np.random.default_rng([seed, 2]).standard_normal((CLASSES * each, NOISE), np.float32)
    labels, held_back = np.repeat(np.arange(CLASSES), each), read("features", test)

    def line(statistics: str, size: int, images: jax.Array) -> study.Line:
        """Returns the quality of images, which are in the order of the labels, and the first one of each class."""
        found = 100 * np.mean(read("logits", images).argmax(-1) == labels)
        first = (255 * np.asarray(images[::each])).round().astype(np.uint8)
        distance = frechet(read("features", images), held_back)
        quality = {"accuracy": found, "distance": distance, "digits": first.tobytes().hex()}
        return {"kind": "samples", "statistics": statistics, "size": size, **quality}

    right = read("logits", test).argmax(-1) == digits().test.labels
    nearest = frechet(read("features", digits().train.images / np.float32(255)), held_back)
    yield {"kind": "real", "reader": 100 * right.mean(), "nearest": nearest}
    retaken = standing(model, variables, seed, config.pick(PASSES, 2))
    for name, chosen in ((STANDING, retaken), (RUNNING, variables)):
        yield line(name, 0, jax.jit(partial(model.apply, train=False))(chosen, noise, labels))
    in_turn = np.arange(len(labels)).reshape(CLASSES, each).T.reshape(-1)  # a batch has as many classes as it can
    for name, order in ((MIXED, in_turn), (ONE, np.arange(len(labels)))):
        for size in SIZES:
            rows = order.reshape(-1, size)
            made = in_batches(model, variables, noise[rows], labels[rows]).reshape(-1, SIDE, SIDE, 1)
            yield line(name, size, made[np.argsort(order)])


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Computes |μ − ν|² + tr(Σ + T − 2(ΣT)^½) for Gaussians of the moments (μ, Σ) and (ν, T) of features `[N, D]`."""
    (mean, cov), (other, covariance) = ((x.mean(0), np.cov(x.T)) for x in (a, b))
    roots = np.sqrt(np.abs(np.linalg.eigvals(cov @ covariance)))  # none is negative but for rounding
    return float(((mean - other) ** 2).sum() + np.trace(cov + covariance) - 2 * roots.sum())


def found(name: str, statistics: str, size: int = 0) -> Measure:
    """Returns a measure: the accuracy or the distance of samples with these statistics."""
    wanted = {"statistics": statistics, "size": size}
    return lambda lines: next((line[name] for line in lines if wanted.items() <= line.items()), float("nan"))


CLAIMS = (
    Claim(
        "Standing statistics: a smaller distance than running averages",
        found("distance", STANDING),
        "<",
        found("distance", RUNNING),
    ),
    Claim(
        "Standing statistics: samples are read as their class more often than with running averages, %",
        found("accuracy", STANDING),
        ">",
        found("accuracy", RUNNING),
    ),
    *(
        Claim(
            f"Statistics of a {kind}, {size} images: a larger distance than standing statistics",
            found("distance", kind, size),
            ">",
            found("distance", STANDING),
        )
        for kind, size in ((MIXED, 4), (ONE, 4), (ONE, 64))
    ),
    Claim(
        "Statistics of a batch of all classes, 64 images: read as often as with standing statistics, %",
        found("accuracy", MIXED, 64),
        "=",
        found("accuracy", STANDING),
        1.0,
    ),
)
DISTANCE = (
    "14×14 digits, a generator with two norms, 1,400 steps of 64 images, and features of a digit reader, instead of "
    "ImageNet and Inception; no averaged weights, no truncated noise. --full takes ten times the steps."
)


def of_kind(lines: list[study.Line], statistics: str) -> list[study.Line]:
    """Returns the lines with one kind of statistics."""
    return [line for line in lines if line.get("statistics") == statistics]


def table(lines: list[study.Line]) -> str:
    """Makes a table of accuracy and distance by statistics and size of the batch."""
    text = ["| statistics | images | read as their class, % | Fréchet distance to held-back digits |", "|---" * 4 + "|"]
    for statistics in (STANDING, RUNNING, MIXED, ONE):
        sizes, right = study.curves(of_kind(lines, statistics), SETTING, "size", "accuracy")
        distance = study.curves(of_kind(lines, statistics), SETTING, "size", "distance")[1]
        for size, each, far in zip(sizes, right.T, distance.T, strict=True):
            text.append(f"| {statistics} | {size or 'any'} | {study.spread(each, 1)} | {study.spread(far, 2)} |")
    real = [[line[name] for line in lines if name in line] for name in ("reader", "nearest")]
    text.append(
        f"| real: read are held-back digits, far are those of training | | {study.spread(real[0], 1)} | "
        f"{study.spread(real[1], 2)} |"
    )
    return "\n".join(text)


def draw(lines: list[study.Line], figure: Figure) -> None:
    """Draws accuracy and distance by the size of a batch, where the size matters as mean and range over the seeds, and
    samples of the first seed, of the same noise.
    """
    places = figure.subplot_mosaic([["accuracy", "samples"], ["distance", "samples"]], width_ratios=(3, 4))
    for name, label in (("accuracy", "read as their class, %"), ("distance", "Fréchet distance of features")):
        for statistics in (MIXED, ONE):
            sizes, values = study.curves(of_kind(lines, statistics), SETTING, "size", name)
            study.band(places[name], sizes, values, label=statistics, marker="o", ms=4)
        for statistics, style in ((STANDING, dict(color="k", ls="--")), (RUNNING, dict(color="C3", ls=":"))):
            values = study.curves(of_kind(lines, statistics), SETTING, "size", name)[1]
            places[name].axhline(values.mean(), label=statistics, **style)
        places[name].set(xscale="log", xlabel="images of a batch", ylabel=label, xticks=SIZES, xticklabels=SIZES)
        places[name].minorticks_off()
    places["distance"].set(yscale="log")
    places["distance"].yaxis.set_major_formatter("{x:g}")
    places["distance"].yaxis.set_minor_formatter("{x:g}")
    figure.legend(*places["accuracy"].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    samples(lines, places["samples"])


def samples(lines: list[study.Line], axes: Any) -> None:
    """Draws a row of ten digits for each of the chosen statistics."""
    chosen = ((STANDING, 0), (RUNNING, 0), (MIXED, 64), (MIXED, 4), (ONE, 64), (ONE, 4), (ONE, 1))
    rows = []
    for statistics, size in chosen:
        line = next(line for line in of_kind(lines, statistics) if line["size"] == size)
        each = np.frombuffer(bytes.fromhex(line["digits"]), np.uint8).reshape(CLASSES, SIDE, SIDE)
        rows.append(np.concatenate(list(np.pad(each, [(0, 0), (1, 1), (1, 1)], constant_values=128)), axis=1))
    axes.imshow(np.concatenate(rows), cmap="gray")
    names = [f"{statistics}\nimages: {size}" if size else statistics for statistics, size in chosen]
    axes.set_yticks([(SIDE + 2) * (i + 0.5) for i in range(len(rows))], names, fontsize="small")
    axes.set_xticks([(SIDE + 2) * (i + 0.5) for i in range(CLASSES)], range(CLASSES))
    axes.set(xlabel="class")


STUDY = study.Study("gan", (SETTING,), trial, table, draw, size=(12, 6.5), claims=CLAIMS, distance=DISTANCE)

if __name__ == "__main__":
    study.run(STUDY, __doc__, RESULTS)
