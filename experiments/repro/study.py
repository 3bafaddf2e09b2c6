"""Runs the trials of a reproduction with several seeds, and writes JSON lines, a table and a picture.

A reproduction is a module `experiments.repro.<paper>` with a `Study`: its settings, a `trial` that yields the lines of
one setting and seed, claims, and a `table` and a `draw`, all of which read only those lines. `experiments.repro.claims`
decides the claims. The lines of a trial are written when it is complete, so that a study which was stopped continues
with the missing trials.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import tyro
from flax import linen as nn
from jax.experimental.compilation_cache import compilation_cache
from matplotlib.figure import Figure
from tqdm import tqdm

from experiments import jsonl
from experiments.data.images import Labelled, Splits, load
from experiments.data.pipeline import Batch, evaluation_batches, training_batches
from experiments.errors import ConfigError
from experiments.jsonl import Line
from experiments.repro.claims import Claim, verdict
from experiments.repro.claims import table as claims_table
from experiments.train.config import Files, Hardware
from experiments.train.devices import data_mesh, describe, start
from experiments.train.loop import (
    Inputs,
    Partition,
    TrainState,
    chunks,
    create_state,
    evaluate,
    images,
    make_eval_step,
    make_train_step,
)

RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of a study: how much is run, and where the results go."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of the trials of each setting, such as `--seeds 10 11 12`. Results with other seeds are kept."""
    smoke: bool = False
    """Run for seconds only: a few steps of each setting with the first seed, into a folder `smoke`."""
    full: bool = False
    """Run at the size of the paper, for larger machines, into a folder `full`."""
    out: Path = RESULTS
    """Folder of the .jsonl, .md and .png."""
    data_dir: Path = Files.data_dir
    """Folder of the Fashion-MNIST files, for the studies that use them."""

    def pick(self, usual: Any, smoke: Any, full: Any = None) -> Any:
        """Returns one of three sizes: `smoke` with --smoke, `full` (if given) with --full, else `usual`."""
        if self.smoke:
            return smoke
        return full if self.full and full is not None else usual


class Study(NamedTuple):
    """A reproduction of one claim: its settings, its trial, and how the results are tabulated and drawn."""

    name: str  # of the module, without the package
    settings: Sequence[str]
    trial: Callable[[str, int, Config], Iterator[Line]]  # (setting, seed, config) -> lines
    table: Callable[[list[Line]], str]  # Markdown
    draw: Callable[[list[Line], Figure], None]
    devices: int = 1  # number of simulated devices
    size: tuple[float, float] = (10, 4)  # of the picture
    claims: Sequence[Claim] = ()  # written before the runs that decide them
    distance: str = ""  # how the protocol differs from that of the paper, in a sentence


def run(study: Study, doc: str | None, results: Path = RESULTS) -> None:
    """Runs the command line of a study, whose results lie in the folder `results` by default."""
    config = tyro.cli(Config, description=doc, default=Config(out=results))
    start(Hardware(devices=study.devices))
    try:
        with _compiled_once():
            _run(study, config)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


@contextmanager
def _compiled_once() -> Iterator[None]:
    """Shares compiled programs between the seeds of a setting: small networks compile longer than they train."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    with TemporaryDirectory() as folder:
        try:
            for name, value in zip(names, (folder, 0.1), strict=True):
                jax.config.update(name, value)
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()


def _run(study: Study, config: Config) -> None:
    """Runs the missing trials of a study, and writes its lines, table and picture."""
    if config.smoke:  # a few steps take less time than optimizing their programs
        jax.config.update("jax_disable_most_optimizations", True)
    folder = config.out / ("smoke" if config.smoke else "full" if config.full else "")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{study.name}.jsonl"
    if config.smoke:
        file.unlink(missing_ok=True)
    for setting, seed in _missing(study, config, file):
        which, wall, cpu = {"setting": setting, "seed": seed}, time.perf_counter(), time.process_time()
        lines = [{**which, **line} for line in study.trial(setting, seed, config)]
        took = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        jsonl.append(file, [*lines, {**which, "kind": "trial", **took, **describe(data_mesh(study.devices))}])
    lines = jsonl.read(file)
    table = report(study, lines)
    file.with_suffix(".md").write_text(f"{table}\n")
    figure = Figure(figsize=study.size, layout="constrained")
    study.draw(lines, figure)
    figure.savefig(file.with_suffix(".png"), dpi=110)
    print(f"{table}\n\n{_took(lines)}; {file.with_suffix('.png')}")


def report(study: Study, lines: list[Line]) -> str:
    """Returns the page of a study: the verdict, its claims, how far the protocol is from the paper's, and the table."""
    parts = [verdict(study.claims, lines), claims_table(study.claims, lines)] if study.claims else []
    distance = [f"Distance from the paper: {study.distance}"] if study.distance else []
    return "\n\n".join([*parts, *distance, study.table(lines)])


def _took(lines: list[Line]) -> str:
    """Returns a line with the wall and CPU time of all trials. CPU time does not depend on what else was running."""
    wall, cpu = (sum(line.get(name, 0) for line in lines) for name in ("seconds", "cpu_seconds"))
    return f"{wall:.0f} s on {jax.devices()[0].device_kind}, {cpu:.0f} s of its cores together"


def _missing(study: Study, config: Config, file: Path) -> Iterator[tuple[str, int]]:
    """Yields the trials that are not in the file, with a progress bar; removes the lines of incomplete trials."""
    seeds = config.seeds[:1] if config.smoke else config.seeds
    lines = jsonl.read(file) if file.exists() else []
    done = {(line["setting"], line["seed"]) for line in lines if line["kind"] == "trial"}
    jsonl.write(file, [line for line in lines if (line["setting"], line["seed"]) in done])
    trials = [(setting, seed) for seed in seeds for setting in study.settings]
    missing = [trial for trial in trials if trial not in done]
    if not missing:
        print(f"{file} holds all {len(trials)} trials: drawing these. --out FOLDER runs them again", file=sys.stderr)
    yield from tqdm(missing, desc=study.name, unit="trial", file=sys.stderr)


def pictures(config: Config) -> Splits:
    """Loads Fashion-MNIST; a smoke run gets the embedded digits, which need no files."""
    return load("mnist-5k" if config.smoke else "fashion-mnist", config.data_dir)


def train(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    data: Splits,
    *,
    steps: int,
    every: int,
    batch_size: int,
    seed: int,
    max_shift: int = 0,
    **options: Any,
) -> Iterator[tuple[TrainState, Line]]:
    """Trains on labelled images, and yields the state and a line every `every` steps; `options` are those of `fit`."""
    epochs = -(-steps // (len(data.train.labels) // batch_size))  # an epoch drops the records that fill no batch
    batches = training_batches(data.train, batch_size, epochs, seed=seed, max_shift=max_shift)
    tests = partial(evaluation_batches, data.test, 1_000)  # a multiple of 8 devices
    return fit(model, optimizer, batches, tests, steps=steps, every=every, seed=seed, **options)


def fit(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    batches: Iterator[Batch],
    tests: Callable[[], Iterator[Batch]],
    *,
    steps: int,
    every: int,
    seed: int,
    devices: int = 1,
    partition: Partition = "jit",
    **inputs: Any,
) -> Iterator[tuple[TrainState, Line]]:
    """Trains, and yields the state and a line every `every` steps and after the last step.

    Args:
        model: called as `model(*inputs(batch), train=...)`; returns logits.
        optimizer: any Optax transformation.
        batches: training batches `{"label", "weight", ...}`.
        tests: called before each evaluation; returns an iterator over the test batches.
        steps: number of training steps.
        every: steps between two lines.
        seed: seed of the initial weights.
        devices: number of devices over which each batch is split.
        partition: "jit" or "shard_map", as in `experiments.train.loop`.
        **inputs: `inputs` returns the model's arguments for a batch, `example` holds such arguments; default: images.

    Returns:
        An iterator over `(TrainState, line)`; a line has the step, the mean `loss` and `train_accuracy` of the training
        batches since the previous line, and `test_loss` and `accuracy` on the test batches.
    """
    mesh = data_mesh(devices)
    example = {"example": inputs.pop("example")} if "example" in inputs else {}
    step = make_train_step(model, optimizer, mesh, partition, lambda state, stats: {}, **inputs)
    eval_step = make_eval_step(model, mesh, **inputs)
    state = create_state(model, optimizer, seed, mesh, **example)
    ends = [*range(every, steps, every), steps]
    for state, rows in chunks(step, state, batches, mesh, ends):  # noqa: B020
        found = evaluate(eval_step, state, tests(), mesh)
        loss, accuracy = (float(np.mean([row[name] for row in rows])) for name in ("loss", "accuracy"))
        line = {"kind": "step", "step": int(state.step), "loss": loss, "train_accuracy": accuracy}
        yield state, {**line, "test_loss": found["loss"], "accuracy": found["accuracy"]}


def scorer(model: nn.Module, inputs: Inputs = images) -> Callable[[TrainState, Labelled], Line]:
    """Returns `score(state, data) -> {"loss", "accuracy"}` in evaluation mode, compiled once."""
    mesh = data_mesh(1)
    step = make_eval_step(model, mesh, inputs)
    return lambda state, data: evaluate(step, state, evaluation_batches(data, 500), mesh)


def curves(lines: list[Line], setting: str, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns x `[T]`, and y of every seed `[seeds, T]`, from the lines of a setting that have both."""
    here = [line for line in lines if line["setting"] == setting and y in line]
    seeds = sorted({line["seed"] for line in here})
    each = [[(line[x], line[y]) for line in here if line["seed"] == seed] for seed in seeds]
    return np.array([point[0] for point in each[0]]), np.array([[value for _, value in points] for points in each])


def steps_to(steps: np.ndarray, accuracy: np.ndarray, level: float) -> str:
    """Returns the mean number of steps after which an accuracy `[seeds, T]` first reaches `level`, as text."""
    reached = accuracy >= level
    if not reached.any(1).all():
        return "not reached"
    return f"{np.mean(steps[reached.argmax(1)]):.0f}"


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Formats the mean, and the sample standard deviation over seeds where there are several."""
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def deviation(values: np.ndarray) -> np.ndarray:
    """Returns the sample standard deviation over seeds, the first axis; 0 for a single seed."""
    return values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1:])


def band(axes: Any, x: np.ndarray, y: np.ndarray, label: str, **style: Any) -> None:
    """Draws the mean over seeds as a line, and their range as a band."""
    (line,) = axes.plot(x, y.mean(0), label=label, **style)
    axes.fill_between(x, y.min(0), y.max(0), color=line.get_color(), alpha=0.2, lw=0)


def below(axes: Any, columns: int = 2, **options: Any) -> None:
    """Draws the legend below the axes, where it covers no curve."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=columns, fontsize="small", **options)
