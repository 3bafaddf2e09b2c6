"""Trains on padded batches, and takes the statistics again with other padding: what `speech` and `graphs` share.

Each setting trains once with each padding, and is tested with the usual one. The network that trained with the usual
padding is also evaluated with the others, and its statistics are taken again with each padding, by
`bnjax.tools.recalibrate` layer by layer, which is exact however the records are batched: what then differs is the
padding alone. The outputs for the test records are compared with those of the usual padding: `apart` is the largest
difference over the largest output.
"""

import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import count, islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure

from bnjax import tools
from bnjax.linen import BatchNorm
from experiments.models.convolutional import Norm
from experiments.models.sequential import layer_norm
from experiments.repro import study
from experiments.repro.claims import Claim, Measure

MASKED, UNMASKED, LAYER_NORM = "masked BN", "BN without the mask", "LayerNorm"
BATCH_NORM = partial(BatchNorm, momentum=0.9)
NORMS: dict[str, tuple[Norm, bool]] = {
    MASKED: (BATCH_NORM, True),
    UNMASKED: (BATCH_NORM, False),
    LAYER_NORM: (layer_norm, False),
}


class Padding(NamedTuple):
    """Says how batches are padded: to which multiple, and whether a batch holds records of about one size."""

    name: str
    multiple: int
    by_size: bool = False


class Batch(NamedTuple):
    """Holds records and padding; N counts both, so that it is the same in every batch."""

    inputs: tuple[Any, ...]  # arguments of the model
    rows: np.ndarray  # [N] int, which records these are; −1 is padding
    target: np.ndarray  # [N]


class Records(NamedTuple):
    """Gives access to the records of training or testing."""

    sizes: np.ndarray  # [M] int, of each record
    batch: Callable[[np.ndarray, int], Batch]  # (rows [N], −1 is padding, and the multiple) -> a batch

    def batches(self, padding: Padding, size: int, rng: np.random.Generator | None = None) -> Iterator[Batch]:
        """Yields every record once, in batches of `size`; in a random order with an `rng`."""
        order = np.arange(len(self.sizes)) if rng is None else rng.permutation(len(self.sizes))
        if padding.by_size:
            order = order[np.argsort(self.sizes[order], kind="stable")]
        rows = np.pad(order, (0, -len(order) % size), constant_values=-1).reshape(-1, size)
        for each in rows if rng is None else rng.permutation(rows):
            yield self.batch(each, padding.multiple)


class Task(NamedTuple):
    """Holds networks and their data."""

    build: Callable[[str, study.Config], nn.Module]  # (setting, config) -> the network
    load: Callable[[study.Config], tuple[Records, Records, Records]]  # for training, for statistics, for testing
    loss: Callable[[jax.Array, jax.Array], jax.Array]  # (outputs, targets) -> [N]
    error: Callable[[np.ndarray, np.ndarray], float]  # (outputs, targets) of all test records
    paddings: tuple[Padding, Padding, Padding]  # the usual one, a wider one, and one by size
    size: int  # records in a batch
    steps: int
    rate: float  # the highest learning rate of Adam


def trial(task: Task, setting: str, seed: int, config: study.Config) -> Iterator[study.Line]:
    """Yields the test error after training with each padding, then by padding in evaluation and behind the
    statistics.
    """
    model, steps, (usual, *others) = task.build(setting, config), config.pick(task.steps, 4), task.paddings
    train, few, test = task.load(config)
    run = jax.jit(partial(model.apply, train=False))
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0, task.rate, steps // 10, steps))
    yield {"kind": "data", "records": [len(part.sizes) for part in (train, few, test)]}

    def tested(variables: Any, padding: Padding, wanted: np.ndarray | None = None) -> tuple[np.ndarray, study.Line]:
        """Returns the outputs for the test records, and a line with their error and how far they are from `wanted`."""
        outputs, targets = predict(partial(run, variables), test.batches(padding, task.size))
        apart = {} if wanted is None else {"apart": np.abs(outputs - wanted).max() / np.abs(wanted).max()}
        return outputs, {"error": task.error(outputs, targets), **apart}

    def trained(padding: Padding) -> Any:
        """Returns the variables after training from the weights of this seed."""
        example = next(train.batches(usual, task.size)).inputs
        start = model.init(jax.random.key(seed), *example, train=False)
        return fit(model, task.loss, optimizer, start, islice(epochs(train, padding, task.size, seed), steps))

    variables = trained(usual)
    own, line = tested(variables, usual)
    yield {"kind": "training", "padding": usual.name, **line}
    for padding in others:
        yield {"kind": "training", "padding": padding.name, **tested(trained(padding), usual)[1]}
    for padding in others:
        yield {"kind": "evaluation", "padding": padding.name, **tested(variables, padding, own)[1]}
    wanted = None
    for padding in task.paddings:
        again = retaken(model, variables, few.batches(padding, task.size))
        outputs, line = tested(again, usual, wanted)
        wanted = outputs if wanted is None else wanted
        yield {"kind": "statistics", "padding": padding.name, **line}


def epochs(records: Records, padding: Padding, size: int, seed: int) -> Iterator[Batch]:
    """Yields training batches without end, in a new order each epoch."""
    for epoch in count():
        yield from records.batches(padding, size, np.random.default_rng([seed, epoch]))


def fit(
    model: nn.Module, loss: Any, optimizer: optax.GradientTransformation, variables: Any, batches: Iterable[Batch]
) -> Any:
    """Trains on the batches, and returns the variables at the end."""

    @jax.jit
    def step(variables: Any, state: Any, batch: Batch) -> tuple[Any, Any]:
        params, real = variables["params"], batch.rows >= 0

        def objective(params: Any) -> tuple[jax.Array, Any]:
            options = dict(train=True, mutable=["batch_stats"])
            outputs, updates = model.apply(variables | {"params": params}, *batch.inputs, **options)
            return jnp.where(real, loss(outputs, batch.target), 0).sum() / real.sum(), updates

        grads, updates = jax.grad(objective, has_aux=True)(params)
        changes, state = optimizer.update(grads, state)
        return {"params": optax.apply_updates(params, changes), **updates}, state

    state = optimizer.init(variables["params"])
    for batch in batches:
        variables, state = step(variables, state, batch)
    return variables


def predict(run: Callable[..., jax.Array], batches: Iterable[Batch]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the outputs and the targets of all records, in the order of their rows."""
    found = [(batch.rows, run(*batch.inputs), batch.target) for batch in batches]
    rows, outputs, targets = (np.concatenate(each) for each in zip(*found, strict=True))
    order = np.argsort(rows)[(rows < 0).sum() :]
    return outputs[order], targets[order]


def retaken(model: nn.Module, variables: Any, batches: Iterable[Batch]) -> Any:
    """Returns the variables with the statistics of these batches; those of a network without statistics as they are."""
    if "batch_stats" not in variables:
        return variables

    def apply(variables: Any, inputs: tuple[Any, ...]) -> Any:
        return model.apply(variables, *inputs, train=False, mutable=["batch_stats"])

    return tools.recalibrate(apply, variables, [b.inputs for b in batches], layerwise=True, progress=False)


def rounding(layers: int, terms: int) -> float:
    """Returns how far outputs may be apart in float32, relative to the largest.

    Each layer rounds sums of so many terms, and the errors of a sum grow as the root of their number.
    """
    return layers * float(np.sqrt(terms) * np.finfo(np.float32).eps)


def at(setting: str, kind: str, padding: Padding, name: str = "error") -> Measure:
    """Returns a measure: the error, or how far outputs are apart, of a setting with this padding."""
    chosen = {"setting": setting, "kind": kind, "padding": padding.name}
    return lambda lines: next((line[name] for line in lines if chosen.items() <= line.items()), float("nan"))


def nothing(lines: list[study.Line]) -> float:
    """Measures 0, with which an absolute difference is compared."""
    return 0.0


def claims(task: Task, settings: Sequence[str], bound: float, margin: float) -> tuple[Claim, ...]:
    """Returns the claims: masked outputs are equal to `bound`, errors to `margin`; without the mask they are not."""
    usual, *others = task.paddings

    def trained(setting: str, padding: Padding = usual) -> Measure:
        return at(setting, "training", padding)

    def statistics(padding: Padding) -> Measure:
        return at(UNMASKED, "statistics", padding)

    more = f"err more than those {usual.name}"
    than = f"{MASKED} errs less than"
    return (
        *(
            Claim(f"{UNMASKED}: statistics of batches padded {p.name} {more}", statistics(p), ">", statistics(usual))
            for p in others
        ),
        *(
            Claim(
                f"{MASKED}: {kind} with batches padded {p.name}: same outputs",
                at(MASKED, kind, p, "apart"),
                "=",
                nothing,
                bound,
            )
            for kind in ("evaluation", "statistics")
            for p in others
        ),
        *(
            Claim(f"{MASKED}: trained {p.name} errs as {usual.name}", trained(MASKED, p), "=", trained(MASKED), margin)
            for p in others
        ),
        *(
            Claim(
                f"{MASKED} errs less than {UNMASKED}, trained {p.name}", trained(MASKED, p), "<", trained(UNMASKED, p)
            )
            for p in task.paddings
        ),
        *(
            Claim(f"{than} {other}, trained {usual.name}", trained(MASKED), "<", trained(other))
            for other in settings[2:]
        ),
    )


def table(task: Task, settings: Sequence[str], unit: str, lines: list[study.Line]) -> str:
    """Makes a table of the errors by padding in training and behind the statistics, and of the largest differences."""
    errors, apart = ("training", "statistics"), ("evaluation", "statistics")
    columns = [(kind, padding) for kind in errors for padding in task.paddings]
    heads = [f"{kind}, {p.name}" for kind, p in columns] + [f"outputs apart, {kind}, at most" for kind in apart]
    text = [f"| test error, {unit} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for setting in settings:
        here = [line for line in lines if line["setting"] == setting]
        cells = [study.spread(by_seed(lines, at(setting, *column)), 2) for column in columns]
        cells += [f"{max(x['apart'] for x in here if x['kind'] == kind and 'apart' in x):.1e}" for kind in apart]
        text.append(f"| {setting} | {' | '.join(cells)} |")
    return "\n".join(text)


def by_seed(lines: list[study.Line], measure: Measure) -> list[float]:
    """Returns a measure of every seed."""
    return [measure([x for x in lines if x["seed"] == seed]) for seed in sorted({x["seed"] for x in lines})]


def draw(task: Task, settings: Sequence[str], label: str, lines: list[study.Line], figure: Figure) -> None:
    """Draws the errors of each seed by padding in training, and by padding behind the statistics."""
    titles = {
        "training": "padding in training",
        "statistics": f"padding behind the statistics (in training: {task.paddings[0].name})",
    }
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (kind, title) in zip(panels, titles.items(), strict=True):
        for i, setting in enumerate(settings):
            for place, padding in enumerate(task.paddings):
                found = by_seed(lines, at(setting, kind, padding))
                x, only = [place + 0.14 * (i - 1)] * len(found), setting if place == 0 else None
                axes.plot(x, found, "osdv"[i], color=f"C{i}", ms=5, alpha=0.7, label=only)
        axes.set_xticks(range(len(task.paddings)), [textwrap.fill(p.name, 16) for p in task.paddings])
        axes.set(xlabel=title, yscale="log", xlim=(-0.5, len(task.paddings) - 0.5))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(axis="y", which="both", alpha=0.3)
    panels[0].set_ylabel(label)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(settings))


def study_of(
    name: str, task: Task, settings: Sequence[str], claims: Sequence[Claim], unit: str, label: str
) -> study.Study:
    """Returns the study of a task; `unit` and `label` are those of the test error in the table and in the picture."""

    def draw_errors(lines: list[study.Line], figure: Figure) -> None:
        draw(task, settings, label, lines, figure)

    size = (10, 4.5)
    return study.Study(
        name,
        settings,
        partial(trial, task),
        partial(table, task, settings, unit),
        draw_errors,
        size=size,
        claims=claims,
    )
