"""A Transformer whose LayerNorms become BN while it trains, as in SLAB, and are then folded away.

Claim:    A Transformer with BN is less accurate than with LayerNorm, one whose LayerNorms become BN on the way is as
          accurate, and folded it is faster.
Command:  python -m experiments.gallery.layernorm_to_bn         # --smoke: seconds
Hardware: 1 CPU core
Time:     5 min

Guo et al. 2024, https://arxiv.org/abs/2405.11582 (SLAB), in its abstract: replacing LayerNorm by BN "often leads to
inferior performance and collapse in training"; PRepBN replaces it progressively, y = λ·LN(x) + (1 − λ)·RepBN(x) with
RepBN(x) = BN(x) + ηx. In the authors' code (https://github.com/xinghaochen/SLAB, classification/models/prepbn.py) λ
falls linearly, η is one number for each layer that begins at 1, and evaluation uses RepBN alone. So it is here, where λ
is 0 after half of the steps; beside it are BN with one of the two changes alone.

RepBN with running averages is BN with the scale γ + η√(σ² + ε) and the bias β + ημ, and `bnjax.tools.fold` moves that
into the Dense layers behind. Queries, keys and values are one Dense here.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure

from bnjax import tools
from bnjax.linen import BatchNorm
from experiments.data.images import Labelled, embedded_digits
from experiments.gallery import RESULTS
from experiments.repro import study
from experiments.repro.claims import Claim, Measure, last

BATCH, RATE, EPSILON = 50, 3e-3, 1e-5
Predict = Callable[[Any, jax.Array], jax.Array]  # logits of variables and images


class Kind(NamedTuple):
    """What a normalisation is made of."""

    layer: bool = False  # LayerNorm
    batch: bool = False  # BN; with LayerNorm it replaces it gradually
    identity: bool = False  # ηx is added to BN


LAYER, BATCH_NORM, REP = "LayerNorm", "BN", "RepBN"
GRADUAL, BOTH = "LayerNorm → BN", "LayerNorm → RepBN"
SETTINGS = {
    LAYER: Kind(layer=True),
    BATCH_NORM: Kind(batch=True),
    REP: Kind(batch=True, identity=True),
    GRADUAL: Kind(layer=True, batch=True),
    BOTH: Kind(layer=True, batch=True, identity=True),
}


class Norm(nn.Module):
    """λ·LN(x) + (1 − λ)·(BN(x) + ηx), or those parts of it that its kind has."""

    kind: Kind

    @nn.compact
    def __call__(self, x: jax.Array, share: jax.Array | float, train: bool) -> jax.Array:
        """Normalises x `[..., C]`; λ is `share`."""
        layer = nn.LayerNorm(epsilon=EPSILON)(x) if self.kind.layer else 0
        if not self.kind.batch:
            return layer
        batch = BatchNorm(use_running_average=not train, momentum=0.9, epsilon=EPSILON)(x)
        if self.kind.identity:
            batch += self.param("eta", nn.initializers.ones, ()) * x
        return share * layer + (1 - share) * batch if self.kind.layer else batch


class VisionTransformer(nn.Module):
    """Pre-norm blocks of attention and two Dense layers on the 16 patches of a digit, as in ViT; mean over patches."""

    kind: Kind
    width: int = 32
    layers: int = 4
    heads: int = 4

    @nn.compact
    def __call__(self, images: jax.Array, share: jax.Array | float = 0.0, train: bool = False) -> jax.Array:
        """Computes logits `[N, 10]` from images `[N, 28, 28, 1]`; λ is `share`."""
        norm = lambda x: Norm(self.kind)(x, share, train)  # noqa: E731
        x = nn.Dense(self.width)(patches(images))
        x += self.param("places", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        for _ in range(self.layers):
            joint = nn.Dense(3 * self.width)(norm(x)).reshape(*x.shape[:2], 3, self.heads, -1)
            mixed = nn.dot_product_attention(*jnp.moveaxis(joint, 2, 0))
            x += nn.Dense(self.width)(mixed.reshape(x.shape))
            x += nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(norm(x))))
        return nn.Dense(10)(norm(x).mean(1))


def patches(images: jax.Array) -> jax.Array:
    """Cuts images `[N, 28, 28, 1]` into patches `[N, 16, 49]`."""
    return images.reshape(-1, 4, 7, 4, 7).swapaxes(2, 3).reshape(-1, 16, 49)


def as_batch_norm(variables: Any) -> Any:
    """Returns the variables of the same network with BN alone: RepBN is BN of another scale and bias."""

    def merged(layer: Any, stats: Any) -> Any:
        norm, eta = layer["BatchNorm_0"], layer.get("eta", 0.0)
        scale = norm["scale"] + eta * jnp.sqrt(stats["BatchNorm_0"]["var"] + EPSILON)
        return {"BatchNorm_0": {"scale": scale, "bias": norm["bias"] + eta * stats["BatchNorm_0"]["mean"]}}

    params, stats = variables["params"], variables["batch_stats"]
    params = {name: merged(layer, stats[name]) if name in stats else layer for name, layer in params.items()}
    return {"params": params, "batch_stats": stats}


def trial(setting: str, seed: int, config: study.Config) -> Iterator[study.Line]:
    """Trains one setting; yields its test accuracy on the way, before and after folding, and times the paper's."""
    data, kind, size = embedded_digits(), SETTINGS[setting], config.pick({}, {"width": 8, "layers": 1})
    test = jnp.asarray(data.test.images / np.float32(255))
    model, plain = (VisionTransformer(each, **size) for each in (kind, Kind(batch=True)))

    def accuracy(predict: Predict, variables: Any) -> float:
        """Computes the test accuracy in %."""
        return float(100 * jnp.mean(predict(variables, test).argmax(-1) == data.test.labels))

    predict = jax.jit(model.apply)
    for step, variables in train(model, data.train, seed, *config.pick((400, 50), (8, 4))):
        yield {"kind": "step", "step": step, "accuracy": accuracy(predict, variables)}
    if not kind.batch:
        return
    folded = tools.fold(plain.apply, as_batch_norm(variables), test[:100])
    programs = {
        "BN": (jax.jit(plain.apply), as_batch_norm(variables)),
        "folded": (jax.jit(folded.apply_fn), folded.stripped),
    }
    for name, program in programs.items():
        yield {"kind": "deployed", "program": name, "final": accuracy(*program), "left": len(folded.left)}
    if setting == BOTH:
        other = VisionTransformer(SETTINGS[LAYER], **size)
        programs[LAYER] = jax.jit(other.apply), other.init(jax.random.key(seed), test[:1])
        for name, took in milliseconds(programs, test[:100], rounds=config.pick(40, 2)).items():
            yield {"kind": "time", "program": name, "milliseconds": took}


def train(model: nn.Module, data: Labelled, seed: int, steps: int, every: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Trains while λ falls to 0 by the middle; yields the step and the variables every `every` steps."""
    images, labels = jnp.asarray(data.images / np.float32(255)), jnp.asarray(data.labels)
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0, RATE, steps // 10, steps))

    def step(carry: Any, given: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        """Takes a step on the images of these rows, with this λ."""
        (params, stats, state), (rows, share) = carry, given

        def loss(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": stats}
            logits, updates = model.apply(variables, images[rows], share, True, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows])
            return losses.mean(), updates.get("batch_stats", {})

        grads, stats = jax.grad(loss, has_aux=True)(params)
        change, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, change), stats, state), None

    run = jax.jit(lambda carry, rows, shares: jax.lax.scan(step, carry, (rows, shares))[0])
    start = jax.jit(model.init)(jax.random.key(seed), images[:1])
    carry = start["params"], start.get("batch_stats", {}), optimizer.init(start["params"])
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(len(labels)) for _ in range(-(-steps * BATCH // len(labels)))])
    rows, shares = order[: steps * BATCH].reshape(steps, BATCH), np.maximum(0, 1 - 2 * np.arange(steps) / steps)
    for now in range(0, steps, every):
        carry = run(carry, rows[now : now + every], shares[now : now + every])
        yield now + every, {"params": carry[0], "batch_stats": carry[1]}


def milliseconds(programs: dict[str, tuple[Predict, Any]], images: jax.Array, rounds: int) -> dict[str, float]:
    """Times the forward passes in turns; returns the median CPU time of each, because the machine may be shared."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds + 1):
        for name, (predict, variables) in programs.items():
            start = time.process_time()
            jax.block_until_ready(predict(variables, images))
            times[name].append(1e3 * (time.process_time() - start))
    return {name: float(np.median(took[1:])) for name, took in times.items()}  # the first one compiles


def after(setting: str, program: str) -> Measure:
    """Returns a measure: the test accuracy in % of a program of one setting after the training."""
    return lambda lines: last(setting, "final")([line for line in lines if line.get("program") == program])


def took(program: str) -> Measure:
    """Returns a measure: the milliseconds of CPU time of a forward pass over 100 images."""
    return lambda lines: last(BOTH, "milliseconds")([line for line in lines if line.get("program") == program])


def accuracy(setting: str) -> Measure:
    """Returns a measure: the test accuracy in % at the end of the training."""
    return last(setting, "accuracy")


CLAIMS = (
    Claim("BN from the start is less accurate than LayerNorm", accuracy(BATCH_NORM), "<", accuracy(LAYER)),
    Claim("LayerNorm → RepBN is more accurate than BN from the start", accuracy(BOTH), ">", accuracy(BATCH_NORM)),
    Claim("LayerNorm → RepBN is as accurate as LayerNorm", accuracy(BOTH), "=", accuracy(LAYER), 1.0),
    Claim("The gradual change alone helps BN", accuracy(GRADUAL), ">", accuracy(BATCH_NORM)),
    Claim("ηx alone helps BN", accuracy(REP), ">", accuracy(BATCH_NORM)),
    Claim("Folded it is as accurate as before", after(BOTH, "folded"), "=", accuracy(BOTH), 0.1),
    Claim("Folded it takes less time than with LayerNorm, ms", took("folded"), "<", took(LAYER)),
)
DISTANCE = (
    "4 blocks 32 wide with softmax attention on 4,000 digits for 400 steps, initial weights of LeCun's size, Adam at "
    "one rate for all, and times of one CPU core, instead of DeiT, PVT and Swin on ImageNet on eight GPUs."
)


def table(lines: list[study.Line]) -> str:
    """Makes a table of the accuracies before and after folding, and one of the times."""
    text = ["| test accuracy, % | as trained | as BN | folded |", "|---|---|---|---|"]
    for setting in SETTINGS:
        cells = [study.spread(study.curves(lines, setting, "step", "accuracy")[1][:, -1], 2)]
        final = study.curves(lines, setting, "program", "final")[1] if SETTINGS[setting].batch else None
        cells += ["", ""] if final is None else [study.spread(values, 2) for values in final.T]
        text.append(f"| {setting} | {' | '.join(cells)} |")
    names, times = study.curves(lines, BOTH, "program", "milliseconds")
    text += ["", f"| CPU time of 100 images, ms | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    return "\n".join([*text, f"| one core | {' | '.join(study.spread(values, 2) for values in times.T)} |"])


def draw(lines: list[study.Line], figure: Figure) -> None:
    """Draws the accuracy by step, and the times of each seed."""
    by_step, by_program = figure.subplots(1, 2, width_ratios=(2, 1))
    looks = (("k", "-"), ("C0", "--"), ("C1", "--"), ("C0", "-"), ("C1", "-"))
    for setting, (color, style) in zip(SETTINGS, looks, strict=True):
        study.band(by_step, *study.curves(lines, setting, "step", "accuracy"), label=setting, color=color, ls=style)
    names, times = study.curves(lines, BOTH, "program", "milliseconds")
    by_program.plot(names, times.T, "o", color="C0")
    by_step.set(xlabel="training step", ylabel="test accuracy, %")
    by_program.set(ylabel="CPU time of 100 images, ms", ylim=(0, 1.1 * times.max()), xmargin=0.2)
    study.below(by_step, 3)


STUDY = study.Study(
    "layernorm_to_bn", tuple(SETTINGS), trial, table, draw, size=(10, 4.5), claims=CLAIMS, distance=DISTANCE
)

if __name__ == "__main__":
    study.run(STUDY, __doc__, RESULTS)
