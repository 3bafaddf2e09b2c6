"""How smooth the loss is along the gradient, with and without BN; and internal covariate shift as a gradient sees it.

Claim:    With BN the loss and the gradient change less along a step, so that the gradient can be trusted further;
          internal covariate shift is not what BN reduces.
Command:  python -m experiments.repro.santurkar2018                 # --smoke: seconds
Hardware: 2 CPU cores
Time:     5 min of one core

Santurkar, Tsipras, Ilyas & Madry 2018, https://arxiv.org/abs/1805.11604, figures 2 and 4 and definition 2.1 (there VGG
on CIFAR-10). Three times conv 3×3 → norm → ReLU → pooling and a Dense layer, one learning rate for both. Every so many
steps, on one batch: the loss and the gradient after steps of several lengths along the gradient; and the gradient of
each layer before and after the layers below it took their step.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from optax import tree

from bnjax.linen import BatchNorm
from experiments.data.images import Labelled
from experiments.models.convolutional import ConvNet, Unnormalised
from experiments.repro import study
from experiments.repro.claims import Claim, Measure, of
from experiments.train.loop import count, images

RATE, BATCH = 0.1, 100
LENGTHS = np.geomspace(0.25, 4, 9)  # of a step, in learning rates; the paper's range is 1/2 to 4
NORMS = {"with BN": partial(BatchNorm, momentum=0.9), "without": Unnormalised}
LAYERS = (("Conv_0", "BatchNorm_0"), ("Conv_1", "BatchNorm_1"), ("Conv_2", "BatchNorm_2"), ("Dense_0",))
Gradient = Callable[[Any], tuple[jax.Array, Any]]


def loss_of(model: nn.Module, stats: Any, batch: Labelled) -> Gradient:
    """Returns a function `params -> (loss, gradient)` of one batch in training mode."""
    fields = {"image": batch.images, "label": batch.labels}

    def loss(params: Any) -> jax.Array:
        variables = {"params": params, "batch_stats": stats}
        logits, _ = model.apply(variables, *images(fields), train=True, mutable=["batch_stats"])
        return count(logits, fields).loss / len(batch.labels)

    return jax.value_and_grad(loss)


def change(a: Any, b: Any) -> study.Line:
    """Returns the distance and the cosine between two gradients."""
    return {"distance": tree.norm(tree.sub(a, b)), "cosine": tree.vdot(a, b) / (tree.norm(a) * tree.norm(b))}


def moved(params: Any, gradient: Any, factors: jax.Array) -> Any:
    """Takes a step down the gradient, with a length for each layer in `factors` `[layers]`, in learning rates."""
    return {
        name: tree.add_scale(params[name], -RATE * factors[layer], gradient[name])
        for layer, names in enumerate(LAYERS)
        for name in names
        if name in params
    }


def shift_of(layer: int, gradient: Any, shifted: Any) -> study.Line:
    """Measures how the gradient of one layer changes; `shifted` stacks the gradients after a step of the layers below
    it.
    """
    names = [name for name in LAYERS[layer] if name in gradient]
    after = {name: jax.tree.map(lambda g: g[layer - 1], shifted[name]) for name in names}
    return change({name: gradient[name] for name in names}, after)


def look(objective: Gradient, params: Any) -> study.Line:
    """Measures loss and gradient along a step, and how each layer's gradient changes when the layers below it step."""
    _, gradient = objective(params)
    along = jnp.repeat(jnp.asarray(LENGTHS, jnp.float32)[:, None], len(LAYERS), 1)
    below = jnp.tri(len(LAYERS), k=-1)[1:]
    losses, there = jax.lax.map(lambda f: objective(moved(params, gradient, f)), jnp.concatenate([along, below]))
    ahead = jax.tree.map(lambda g: g[: len(LENGTHS)], there)
    shifted = jax.tree.map(lambda g: g[len(LENGTHS) :], there)
    found = jax.vmap(partial(change, gradient))(ahead)
    way = RATE * along[:, 0] * tree.norm(gradient)
    shifts = [shift_of(layer, gradient, shifted) for layer in range(1, len(LAYERS))]
    shift = {f"shift_{name}": jnp.stack([each[name] for each in shifts]) for name in shifts[0]}
    return {"losses": losses[: len(LENGTHS)], **found, "smoothness": found["distance"] / way, **shift}


def trial(setting: str, seed: int, config: study.Config) -> Iterator[study.Line]:
    """Trains by plain SGD, and yields what `look` measures as training goes on."""
    data = study.pictures(config)
    model = ConvNet(NORMS[setting], config.pick((8, 16, 32), (2, 4, 4), full=(32, 64, 128)))
    order = np.random.default_rng(seed).permutation(len(data.train.labels))[:BATCH]
    batch = Labelled(*(jnp.asarray(part[order]) for part in data.train))
    find = jax.jit(lambda params, stats: look(loss_of(model, stats, batch), params))
    options = dict(steps=config.pick(600, 20, full=15_000), every=config.pick(40, 10, full=250), batch_size=BATCH)
    for state, line in study.train(model, optax.sgd(RATE), data, seed=seed, **options):
        yield {**line, **jax.device_get(find(state.params, state.batch_stats))}


def course(lines: list[study.Line], setting: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps, and what was measured there, `[seeds, T, step lengths or layers]`."""
    return study.curves(lines, setting, "step", name)


def table(lines: list[study.Line]) -> str:
    """Makes a table of means over the training; loss range, distance and smoothness are the largest over
    step lengths.
    """
    above = range(2, len(LAYERS) + 1)
    text = [
        "| | accuracy | range of the loss | gradient: distance | by the way gone (β) | cosine after 1, 4 rates | "
        f"shift: distance, layers {', '.join(map(str, above))} | shift: cosine |",
        "|---" * 8 + "|",
    ]
    for setting in NORMS:
        found = {name: course(lines, setting, name)[1] for name in ("losses", "distance", "smoothness", "cosine")}
        shift = [course(lines, setting, f"shift_{name}")[1].mean((0, 1)) for name in ("distance", "cosine")]
        cosine = found["cosine"].mean((0, 1))
        cells = [
            study.spread(course(lines, setting, "accuracy")[1][:, -1]),
            study.spread(np.ptp(found["losses"], axis=2).mean(1)),
            *(study.spread(found[name].max(2).mean(1)) for name in ("distance", "smoothness")),
            *(", ".join(f"{value:.2f}" for value in values) for values in (cosine[[len(cosine) // 2, -1]], *shift)),
        ]
        text.append(f"| {setting} | {' | '.join(cells)} |")
    return "\n".join(text)


def draw(lines: list[study.Line], figure: Figure) -> None:
    """Draws the three panels of the paper's figure 4, the cosine, and the internal covariate shift of its figure 2."""
    (loss, distance, smoothness), (cosine, shift, turn) = figure.subplots(2, 3)
    for i, setting in enumerate(NORMS):
        steps, values = course(lines, setting, "losses")
        study.band(loss, steps, np.ptp(values, axis=2), label=setting)
        steps, values = course(lines, setting, "distance")
        study.band(distance, steps, values.max(2), label=setting)
        steps, values = course(lines, setting, "smoothness")
        study.band(smoothness, steps, values.max(2), label=setting)
        _, values = course(lines, setting, "cosine")
        study.band(cosine, LENGTHS, values.mean(1), label=setting)
        for axes, name in ((shift, "shift_distance"), (turn, "shift_cosine")):
            steps, values = course(lines, setting, name)
            for layer, style in enumerate((":", "--", "-")):
                label = f"{setting}, layer {layer + 2}"
                study.band(axes, steps, values[..., layer], label=label, color=f"C{i}", ls=style)
    loss.set(title="loss along the step", ylabel="range over step lengths", yscale="log")
    distance.set(title="distance of the gradients", ylabel="largest over step lengths", yscale="log")
    smoothness.set(title="effective β", ylabel="largest distance / way gone", yscale="log")
    cosine.set(title="cosine of the gradients", xlabel="length of the step, learning rates", xscale="log")
    shift.set(title="internal covariate shift: distance", ylabel="of a layer's gradients", yscale="log")
    turn.set(title="internal covariate shift: cosine", ylabel="of a layer's gradients")
    cosine.set_xticks([0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"])
    cosine.minorticks_off()
    for axes in (loss, distance, smoothness, shift):
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    for axes in (loss, distance, smoothness, cosine, shift, turn):
        study.below(axes)
    for axes in (loss, distance, smoothness, shift, turn):
        axes.set_xlabel("training step")


WITH, WITHOUT = NORMS


def take(layer: int, values: np.ndarray, axis: int) -> np.ndarray:
    """Returns the values of one layer; `axis` is that of the layers."""
    return np.take(values, layer, axis)


def mean_of(setting: str, name: str, reduce: Callable[..., np.ndarray]) -> Measure:
    """Returns a measure: the mean over the training of what `reduce` makes of all step lengths, or layers."""
    return of(setting, name, lambda values: reduce(values, axis=1).mean())


def both(text: str, sign: Literal["<", ">"], name: str, reduce: Callable[..., np.ndarray]) -> Claim:
    """Returns a claim on the network with BN beside the network without."""
    return Claim(text, mean_of(WITH, name, reduce), sign, mean_of(WITHOUT, name, reduce))


CLAIMS = (
    both("With BN the loss has a smaller range along the step", "<", "losses", np.ptp),
    both("With BN the gradient is less far from that at the start of the step", "<", "distance", np.max),
    both("With BN the effective β is smaller", "<", "smoothness", np.max),
    *(
        both(f"With BN the covariate shift of layer {layer + 2} is larger", ">", "shift_distance", partial(take, layer))
        for layer in range(len(LAYERS) - 1)
    ),
)
DISTANCE = (
    "a CNN of three blocks on Fashion-MNIST instead of VGG on CIFAR-10, 600 steps instead of 15,000, one rate for both."
)
STUDY = study.Study("santurkar2018", tuple(NORMS), trial, table, draw, size=(13, 9), claims=CLAIMS, distance=DISTANCE)

if __name__ == "__main__":
    study.run(STUDY, __doc__)
