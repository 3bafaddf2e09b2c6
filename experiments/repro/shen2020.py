"""Text in padded batches: BN with and without a mask, PowerNorm and LayerNorm in a small Transformer and an LSTM.

Claim:    Statistics taken of batches with more padding harm BN that counts it, and not BN with a mask; BN is behind
          LayerNorm, and PowerNorm ahead of it.
Command:  python -m experiments.repro.shen2020                   # --smoke: seconds; --full: ten times the steps
Hardware: 1 CPU core
Time:     17 min of one core

Shen, Yao, Gholami, Mahoney & Keutzer 2020, https://arxiv.org/abs/2003.07845: in Transformers BN is behind LayerNorm,
because its statistics fluctuate from batch to batch, and PowerNorm ahead of it. Here lines of Python's standard
library, cut after 64 characters, so that 37 % is padding, in batches of 32; Adam at one rate for all.

Bits per character: of held-back lines in evaluation mode; of the same lines in training mode, normalised by their
batch; and in evaluation mode with running averages that `bnjax.tools.recalibrate` took of batches padded to 1, 2 and 4
times the width of training, as a program would that pads otherwise. With its running averages as they were no network
depends on the padding that evaluation adds. In training mode statistics over time look ahead; evaluation is causal.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure

from bnjax.linen import BatchNorm, PowerNorm
from bnjax.tools import recalibrate
from experiments.data import text
from experiments.data.pipeline import Batch
from experiments.models.sequential import LSTM, Transformer, layer_norm
from experiments.repro import study
from experiments.repro.claims import Claim, Measure, last
from experiments.train.devices import data_mesh
from experiments.train.loop import TrainState, count, evaluate, make_eval_step

LONGEST, BATCH, RATE, TIMES = 64, 32, 3e-3, (1, 2, 4)
MODELS = {"Transformer": Transformer, "LSTM": LSTM}
BATCH_NORM = partial(BatchNorm, momentum=0.9)
NORMS = {
    "masked BN": (BATCH_NORM, True),
    "PowerNorm": (PowerNorm, True),
    "BN without the mask": (BATCH_NORM, False),
    "LayerNorm": (layer_norm, False),
}
SETTINGS = {f"{model}, {norm}": (MODELS[model], *NORMS[norm]) for model in MODELS for norm in NORMS}
corpus = cache(text.corpus)


def bits(nats: float) -> float:
    """Converts a cross-entropy from nats to bits."""
    return nats / np.log(2)


def trial(setting: str, seed: int, config: study.Config) -> Iterator[study.Line]:
    """Trains one setting; yields bits per character by step, then in training mode and by padding behind the
    statistics.
    """
    data, (build, norm, masked) = corpus(LONGEST), SETTINGS[setting]
    size = config.pick({}, {"width": 8, "layers": 1})
    model, lines = build(norm, text.VOCABULARY, masked, **size), config.pick(400, 100)
    steps, held_back = config.pick(300, 8, full=4_000), data.test[:: len(data.test) // lines][:lines]
    yield {"kind": "corpus", **data.describe()}
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0, RATE, steps // 10, steps))
    example = text.inputs(text.batch(held_back[:1]))
    tests = partial(text.evaluation_batches, held_back, 100)
    batches = text.training_batches(data.train, BATCH, seed=seed)
    options = dict(steps=steps, every=steps // 8, seed=seed, inputs=text.inputs, example=example)
    for state, line in study.fit(model, optimizer, batches, tests, **options):  # noqa: B007
        yield {**line, "training": bits(line["loss"]), "evaluation": bits(line["test_loss"])}
    yield {"kind": "mode", "mode": in_training_mode(model, state, tests())}
    few, measure = data.train[:: len(data.train) // lines][:lines], in_evaluation_mode(model)
    for times in config.pick(TIMES, TIMES[-1:]):
        padded = partial(text.evaluation_batches, batch_size=100, width=times * LONGEST)
        yield {
            "kind": "padding",
            "times": times,
            "bits": measure(retaken(model, state, padded(few)), padded(held_back)),
        }


def in_training_mode(model: nn.Module, state: TrainState, batches: Iterator[Batch]) -> float:
    """Computes bits per character when each batch is normalized by its own statistics, which include later
    positions.
    """

    @jax.jit
    def step(state: TrainState, batch: Batch) -> Any:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        return count(model.apply(variables, *text.inputs(batch), train=True, mutable=["batch_stats"])[0], batch)

    return bits(evaluate(step, state, batches, data_mesh(1))["loss"])


def in_evaluation_mode(model: nn.Module) -> Callable[[TrainState, Iterator[Batch]], float]:
    """Returns `measure(state, batches)`, which computes bits per character with the running averages of the state."""
    step = make_eval_step(model, data_mesh(1), text.inputs)
    return lambda state, batches: bits(evaluate(step, state, batches, data_mesh(1))["loss"])


def retaken(model: nn.Module, state: TrainState, batches: Iterator[Batch]) -> TrainState:
    """Replaces the running averages of the state by statistics of these batches; a state without averages
    is unchanged.
    """
    if not state.batch_stats:
        return state

    def apply(variables: Any, batch: Batch) -> Any:
        return model.apply(variables, *text.inputs(batch), train=False, mutable=["batch_stats"])

    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return state._replace(batch_stats=recalibrate(apply, variables, batches, progress=False)["batch_stats"])


def table(lines: list[study.Line]) -> str:
    """Makes a table of the last bits per character in each mode and with each padding."""
    widths, _ = study.curves(lines, next(iter(SETTINGS)), "times", "bits")
    statistics = " | ".join(f"statistics of {times}× the width" for times in widths)
    text = [f"| | training | test, training mode | test, evaluation mode | {statistics} |"]
    text.append("|---" * (4 + len(widths)) + "|")
    for setting in SETTINGS:
        training, found = (study.curves(lines, setting, "step", name)[1][:, -1] for name in ("training", "evaluation"))
        (_, mode), (_, padded) = (study.curves(lines, setting, *xy) for xy in (("kind", "mode"), ("times", "bits")))
        cells = [study.spread(values, 2) for values in (training, mode[:, 0], found, *padded.T)]
        text.append(f"| {setting} | {' | '.join(cells)} |")
    return "\n".join(text)


def draw(lines: list[study.Line], figure: Figure) -> None:
    """Draws bits per character of both networks by step, and by the padding behind the statistics."""
    looks = dict(zip(NORMS, ("o-", "s--", "v-.", "d:"), strict=True))
    for (by_step, by_padding), model in zip(figure.subplots(2, 2).T, MODELS, strict=True):
        for norm, look in looks.items():
            for axes, x, y in ((by_step, "step", "evaluation"), (by_padding, "times", "bits")):
                times, found = study.curves(lines, f"{model}, {norm}", x, y)
                study.band(axes, times, found, label=norm, marker=look[0], ls=look[1:], ms=4)
        by_step.set(xlabel="training step", ylabel="bits per character, held-back lines", title=model)
        by_padding.set(xlabel="padded width behind the statistics, × that of training", xscale="log")
        by_padding.set(ylabel="bits per character, held-back lines", xticks=times, xticklabels=times)
        by_padding.minorticks_off()
        study.below(by_padding)


def padded(setting: str, times: int) -> Measure:
    """Returns a measure: bits per character with statistics of batches padded to a multiple of the width."""
    return lambda lines: last(setting, "bits")([line for line in lines if line.get("times") == times])


def at_the_end(setting: str) -> Measure:
    """Returns a measure: bits per character of held-back lines in evaluation mode."""
    return last(setting, "evaluation")


CLAIMS = (
    *(
        Claim(f"{m}: unmasked BN, statistics of 4 times the padding cost bits", padded(s, 4), ">", padded(s, 1))
        for m in MODELS
        for s in [f"{m}, BN without the mask"]
    ),
    *(
        Claim(f"{m}: masked BN, the same statistics cost none", padded(s, 4), "=", padded(s, 1), 0.01)
        for m in MODELS
        for s in [f"{m}, masked BN"]
    ),
    *(
        Claim(
            f"{m}: {worse} takes more bits than {better}",
            at_the_end(f"{m}, {worse}"),
            ">",
            at_the_end(f"{m}, {better}"),
        )
        for m in MODELS
        for worse, better in (("masked BN", "LayerNorm"), ("LayerNorm", "PowerNorm"))
    ),
)
DISTANCE = (
    "a Transformer of two layers on characters of Python's library for 300 steps instead of translation and word "
    "models; the order of the norms is the paper's claim, the effect of padding ours, with statistics taken anew "
    "of padded batches."
)
STUDY = study.Study("shen2020", tuple(SETTINGS), trial, table, draw, size=(10, 8), claims=CLAIMS, distance=DISTANCE)

if __name__ == "__main__":
    study.run(STUDY, __doc__)
