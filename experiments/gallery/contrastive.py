"""SimCLR over eight devices: BN that each device computes for itself tells the pairs apart, and learns less.

Claim:    With BN local to each of eight devices the contrastive task becomes easier and a linear probe of the features
          worse; global BN and shuffled rows mend it.
Command:  python -m experiments.gallery.contrastive             # --smoke: seconds; --full: 4,000 steps
Hardware: 2 CPU cores; the devices are an axis of `jax.vmap`
Time:     6 min of one core

Chen et al. 2020, https://arxiv.org/abs/2002.05709 (SimCLR, section 2.2: global BN), and He et al. 2020,
https://arxiv.org/abs/1911.05722 (MoCo, section 3.3: shuffled BN): both views of an image are normalised in the company
of the same few images of their device, whose statistics they then share, and the network can tell the pair by these.
Fashion-MNIST, eight devices with eight images each; a random crop of 20×20, mirrored, with another contrast and
brightness, makes a view. The probe is a ridge regression on the features of evaluation mode.
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

import bnjax
from bnjax.linen import BatchNorm
from experiments.gallery import RESULTS
from experiments.models.convolutional import Norm
from experiments.repro import study
from experiments.repro.claims import Claim, Measure, of
from experiments.train.devices import DATA

DEVICES, EACH, CROP, TEMPERATURE, LINES = 8, 8, 20, 0.2, 8
LOCAL, GLOBAL, SHUFFLED = "local BN", "global BN", "local BN, shuffled rows"
SETTINGS = {
    LOCAL: partial(BatchNorm, momentum=0.9, stats_axis_name=DATA),
    GLOBAL: partial(BatchNorm, momentum=0.9, axis_name=DATA),
    SHUFFLED: partial(BatchNorm, momentum=0.9, stats_axis_name=DATA),
}


class Encoder(nn.Module):
    """Blocks of Conv 3×3 with stride 2 → norm → ReLU, the mean over positions, and a projection head with a norm."""

    norm: Norm
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array, **flags: bool) -> tuple[jax.Array, jax.Array]:
        """Computes features `[N, C]` and their projections `[N, 32]`, of length one, from images `[N, H, W, 1]`."""
        for width in self.widths:
            x = nn.relu(self.norm()(nn.Conv(width, (3, 3), strides=2, use_bias=False)(x), **flags))
        features = x.mean((1, 2))
        hidden = nn.relu(self.norm()(nn.Dense(self.widths[-1], use_bias=False)(features), **flags))
        z = nn.Dense(32)(hidden)
        return features, z * jax.lax.rsqrt((z**2).sum(-1, keepdims=True) + 1e-12)  # a row of zeros stays one


def view(image: jax.Array, key: jax.Array) -> jax.Array:
    """Draws a view `[CROP, CROP, 1]` of an image `[28, 28, 1]` float."""
    keys = jax.random.split(key, 4)
    corner = jax.random.randint(keys[0], (2,), 0, 28 - CROP + 1)
    x = jax.lax.dynamic_slice(image, (*corner, 0), (CROP, CROP, 1))
    x = jnp.where(jax.random.bernoulli(keys[1]), x[:, ::-1], x)
    contrast, brightness = jax.random.uniform(keys[2], minval=0.4, maxval=1.6), jax.random.uniform(keys[3], maxval=0.3)
    return contrast * x + brightness


def contrast(first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes the NT-Xent loss of projections `[N, C]` of two views, and how often the pair is the most similar."""
    z = jnp.concatenate([first, second])
    similar = z @ z.T / TEMPERATURE - 1e9 * jnp.eye(len(z))
    pair = jnp.roll(jnp.arange(len(z)), len(first))
    loss = optax.softmax_cross_entropy_with_integer_labels(similar, pair).mean()
    return loss, (similar.argmax(-1) == pair).mean()


def encode(model: nn.Module, shuffled: bool, variables: Any, views: Any, key: jax.Array) -> tuple[Any, Any, Any]:
    """Encodes two views on one device `[EACH, ...]`; returns their projections and the new statistics."""
    training = dict(use_running_average=False)
    (_, first), updates = model.apply(variables, views[0], **training, mutable=["batch_stats"])
    rows = bnjax.shuffle(views[1], key, axis_name=DATA) if shuffled else views[1]
    _, second = model.apply(variables, rows, **training, update_stats=False)
    second = bnjax.unshuffle(second, key, axis_name=DATA) if shuffled else second
    return first, second, updates["batch_stats"]


def trial(setting: str, seed: int, config: study.Config) -> Iterator[study.Line]:
    """Trains one encoder; yields the loss and the accuracy of the contrastive task, and that of the linear probe."""
    data, steps = study.pictures(config), config.pick(600, 8, full=4_000)
    model = Encoder(SETTINGS[setting], config.pick((16, 32, 64), (4, 8)))
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))
    for_probe = [few(part, config.pick(3_000, 200)) for part in data]
    images = jnp.asarray(data.train.images[: config.pick(20_000, 500)])
    variables = model.init(jax.random.key(seed), jnp.zeros((1, CROP, CROP, 1)), use_running_average=True)

    def step(carry: Any, key: jax.Array) -> tuple[Any, Any]:
        """Takes one step on images drawn anew."""
        params, stats, opt_state = carry
        rows, *keys, order = jax.random.split(key, 4)
        x = images[jax.random.randint(rows, (DEVICES * EACH,), 0, len(images))] / 255.0
        views = [jax.vmap(view)(x, jax.random.split(k, len(x))).reshape(DEVICES, EACH, CROP, CROP, 1) for k in keys]

        def loss(params: Any) -> tuple[jax.Array, Any]:
            on_device = partial(encode, model, setting == SHUFFLED, {"params": params, "batch_stats": stats}, key=order)
            first, second, new = jax.vmap(lambda *v: on_device(v), axis_name=DATA)(*views)
            value, accuracy = contrast(*(z.reshape(DEVICES * EACH, -1) for z in (first, second)))
            return value, (accuracy, jax.tree.map(lambda leaf: leaf[0], new))  # the same on all devices

        (value, (accuracy, stats)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), stats, opt_state), (value, accuracy)

    some = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))
    carry = variables["params"], variables["batch_stats"], optimizer.init(variables["params"])
    for number, keys in enumerate(jax.random.split(jax.random.key(seed + 1), (LINES, steps // LINES)), start=1):
        carry, (value, accuracy) = some(carry, keys)
        found = {"loss": float(value.mean()), "pretext": float(accuracy.mean())}
        yield {"kind": "step", "step": number * steps // LINES, **found, "probe": probe(model, carry, *for_probe)}


def few(data: Any, number: int) -> tuple[jax.Array, np.ndarray]:
    """Returns the middle of the first images as floats `[number, CROP, CROP, 1]`, and their labels."""
    edge = (28 - CROP) // 2
    return jnp.asarray(data.images[:number, edge:-edge, edge:-edge]) / 255.0, data.labels[:number]


def probe(model: nn.Module, carry: Any, train: Any, test: Any) -> float:
    """Returns the test accuracy of a ridge regression from the features of evaluation mode to the classes."""
    variables = {"params": carry[0], "batch_stats": carry[1]}
    x, y = (np.asarray(model.apply(variables, images, use_running_average=True)[0]) for images, _ in (train, test))
    mean, scale = x.mean(0), x.std(0) + 1e-6
    x, y = (np.c_[(z - mean) / scale, np.ones(len(z))] for z in (x, y))
    weights = np.linalg.solve(x.T @ x + len(x) * 1e-3 * np.eye(x.shape[1]), x.T @ np.eye(10)[train[1]])
    return float(((y @ weights).argmax(1) == test[1]).mean())


def end(setting: str, name: str) -> Measure:
    """Returns a measure: the last value in %."""
    return of(setting, name, lambda values: 100 * values[-1])


CLAIMS = (
    Claim("Local BN finds more pairs than global BN", end(LOCAL, "pretext"), ">", end(GLOBAL, "pretext")),
    Claim("Local BN has a worse probe than global BN", end(LOCAL, "probe"), "<", end(GLOBAL, "probe")),
    Claim("Shuffled rows find fewer pairs than local BN", end(SHUFFLED, "pretext"), "<", end(LOCAL, "pretext")),
    Claim("Shuffled rows have a better probe than local BN", end(SHUFFLED, "probe"), ">", end(LOCAL, "probe")),
)
DISTANCE = (
    "Fashion-MNIST, a CNN of three layers and 600 steps of 64 images instead of ImageNet, ResNet-50 and 4,096; "
    "the probe is a ridge regression."
)


def table(lines: list[study.Line]) -> str:
    """Makes a table of the contrastive task and the probe at the end."""
    text = ["| | loss | pairs found, % | linear probe, % |", "|---|---|---|---|"]
    for setting in SETTINGS:
        found = [study.curves(lines, setting, "step", name)[1][:, -1] for name in ("loss", "pretext", "probe")]
        cells = [study.spread(found[0], 2), *(study.spread(100 * values, 2) for values in found[1:])]
        text.append(f"| {setting} | {' | '.join(cells)} |")
    return "\n".join(text)


def draw(lines: list[study.Line], figure: Figure) -> None:
    """Draws how many pairs are found, and the accuracy of the probe, by step."""
    for axes, name, label in zip(
        figure.subplots(1, 2), ("pretext", "probe"), ("pairs found, %", "linear probe, %"), strict=True
    ):
        for setting in SETTINGS:
            steps, found = study.curves(lines, setting, "step", name)
            study.band(axes, steps, 100 * found, label=setting, marker=".")
        axes.set(xlabel="training step", ylabel=label)
        study.below(axes)


STUDY = study.Study("contrastive", tuple(SETTINGS), trial, table, draw, size=(10, 5), claims=CLAIMS, distance=DISTANCE)

if __name__ == "__main__":
    study.run(STUDY, __doc__, RESULTS)
