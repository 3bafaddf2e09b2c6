"""Trains a network with batch normalisation on real images over every device, and shows its work.

Claim:    A three-block BN network reads at least 98 % of 1,000 held-back MNIST digits after a minute on two CPU cores.
Command:  python -m experiments.train
Hardware: 2 CPU cores
Time:     50 to 75 s
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import grain
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import linen as nn
from grain.sharding import ShardByJaxProcess, ShardOptions
from orbax.checkpoint import CheckpointManager
from tqdm import tqdm

from bnjax.linen import BatchNorm
from bnjax.tools import inspect
from experiments import jsonl
from experiments.data.images import Splits, load
from experiments.data.pipeline import evaluation_batches, training_batches
from experiments.errors import ConfigError, RunError
from experiments.models.convolutional import ConvNet, ResNet20
from experiments.train import devices, nonfinite
from experiments.train.checkpoints import open_checkpoints, restore, save
from experiments.train.config import Config, Training, check_split, defaults, validate
from experiments.train.drift import drift
from experiments.train.fingerprint import fingerprint
from experiments.train.loop import (
    EvalStep,
    Metrics,
    Partition,
    TrainState,
    TrainStep,
    axis_name,
    chunks,
    create_state,
    evaluate,
    make_eval_step,
    make_train_step,
)
from experiments.train.optimizer import adamw, warmup_cosine
from experiments.train.plots import draw
from experiments.train.records import (
    CHECKPOINTS,
    EVENTS,
    METRICS,
    Recorder,
    check_resumable,
    run_folder,
    written,
)
from experiments.train.stopping import stop_requests

EPSILON = 1e-5
CURVES = "curves.png"
LAYERS = "layers.txt"
LOST, REFUSED = 1, 2  # exit statuses: a run that had started failed; the options or files are not usable


class Session(NamedTuple):
    """Everything that a training run uses and that does not change from step to step."""

    config: Config
    mesh: jax.sharding.Mesh
    data: Splits
    shard: ShardOptions
    batches: grain.DatasetIterator
    train_step: TrainStep
    eval_step: EvalStep
    epoch: int  # steps in an epoch
    total: int  # steps in the whole training


def build_model(training: Training, partition: Partition) -> nn.Module:
    """Builds the network; its BN layers compute statistics over the whole batch under either partition."""
    dtype = jnp.dtype(training.precision)
    norm = partial(BatchNorm, momentum=training.momentum, epsilon=EPSILON, axis_name=axis_name(partition), dtype=dtype)
    network = {"convnet": ConvNet, "resnet20": ResNet20}[training.model]
    return network(norm, widths=(training.width, 2 * training.width, 4 * training.width), dtype=dtype)


def build(config: Config) -> tuple[Session, TrainState]:
    """Builds the data pipeline, the compiled steps and the initial state for the devices of this machine."""
    training = config.training
    mesh = devices.data_mesh(config.hardware.devices)
    data = load(training.data, config.files.data_dir)
    check_split(training.batch_size, mesh.size, training.accumulate, len(data.train.labels))
    shard = ShardByJaxProcess()
    epoch = len(data.train.labels) // training.batch_size
    schedule = warmup_cosine(training.lr, training.epochs * epoch, training.warmup)
    optimizer = nonfinite.skip_nonfinite(adamw(schedule, training.weight_decay))
    model = build_model(training, config.hardware.partition)

    def observe(state: TrainState, stats: Any) -> Metrics:
        """Returns further metrics of a step: its learning rate, and the drift of each BN layer."""
        layers = drift(state.batch_stats, stats, momentum=training.momentum, epsilon=EPSILON)
        return {"learning_rate": schedule(state.step - state.opt_state.total_notfinite), "drift": layers}

    train_step = make_train_step(
        model, optimizer, mesh, config.hardware.partition, observe, accumulate=training.accumulate
    )
    batches = training_batches(
        data.train,
        training.batch_size,
        training.epochs,
        seed=training.seed,
        max_shift=training.max_shift,
        flip=training.flip,
        shard=shard,
    )
    eval_step = make_eval_step(model, mesh)
    session = Session(config, mesh, data, shard, batches, train_step, eval_step, epoch, training.epochs * epoch)
    scale = nonfinite.initial_scale if training.precision == "float16" else lambda: None
    example = (np.zeros((1, *data.train.images.shape[1:]), np.float32),)
    return session, create_state(model, optimizer, training.seed, mesh, scale, example)


def fit(
    session: Session,
    state: TrainState,
    recorder: Recorder,
    manager: CheckpointManager,
    stop_requested: Callable[[], bool],
) -> TrainState:
    """Trains to the end, to --stop-after or to a signal; records, evaluates and saves on the way; returns the last
    state.
    """
    files = session.config.files
    first, last = int(state.step), min(session.total, files.stop_after or session.total)
    saves = {session.epoch, files.save_every or session.epoch}
    ends = chunk_ends(first, last, files.log_every, *saves)
    bar = tqdm(total=session.total, initial=first, unit="step", disable=None if is_first_process() else True)
    with bar:
        since = time.perf_counter()
        trained = chunks(session.train_step, state, session.batches, session.mesh, ends)
        for state, rows in trained:
            speed = len(rows) * session.config.training.batch_size / (time.perf_counter() - since)
            step, stop = int(state.step), stop_requested()
            record(recorder, bar, step, rows, speed)
            nonfinite.check(rows, step, session.config.training.skip_nonfinite)
            if step % session.epoch == 0:
                measure(session, state, recorder)
            if stop or step == last or any(step % steps == 0 for steps in saves):
                recorder.flush()
                save(manager, state, session.batches)
            if stop:
                break
            since = time.perf_counter()
    return state


def chunk_ends(first: int, last: int, *intervals: int) -> list[int]:
    """Returns the steps in (first, last] that are a multiple of one of the intervals, and `last` itself."""
    return [step for step in range(first + 1, last + 1) if step == last or any(step % n == 0 for n in intervals)]


def record(recorder: Recorder, bar: tqdm, step: int, rows: list[Metrics], speed: float) -> None:
    """Writes the metrics of the steps up to `step`, and shows the last of them in the progress bar.

    The first images/s of a run includes compilation.
    """
    for number, row in enumerate(rows, start=step - len(rows) + 1):
        recorder.write("train", number, **row)
    recorder.write("speed", step, images_per_second=speed)
    bar.update(len(rows))
    bar.set_postfix_str(f"loss {rows[-1]['loss']:.4f}, accuracy {rows[-1]['accuracy']:.3f}, {speed:.0f} images/s")


def measure(session: Session, state: TrainState, recorder: Recorder) -> None:
    """Evaluates on the test images with the running averages, and records loss and accuracy."""
    batches = evaluation_batches(session.data.test, session.config.training.batch_size, session.shard)
    step, result = int(state.step), evaluate(session.eval_step, state, batches, session.mesh)
    recorder.write("eval", step, **result)
    if is_first_process():
        tqdm.write(f"epoch {step // session.epoch}: test loss {result['loss']:.4f}, accuracy {result['accuracy']:.2%}")


def run(config: Config) -> str:
    """Trains, draws the curves, and returns the last line to print."""
    started = time.perf_counter()
    validate(config)
    files = config.files
    devices.start(config.hardware)
    session, state = build(config)
    with written(files.out or files.runs):
        folder, goes_on = run_folder(files.runs, files.out, files.resume)
        if goes_on:
            check_resumable(folder, asdict(config))
        elif files.resume and is_first_process():
            print(f"nothing to resume yet: {folder} begins at step 0")
        state = train(session, state, folder, goes_on)
        if is_first_process():
            look(state, folder / LAYERS)
        return f"{summary(folder, session.total, time.perf_counter() - started)}; state {fingerprint(state)}"


def train(session: Session, state: TrainState, folder: Path, goes_on: bool) -> TrainState:
    """Trains from the last checkpoint, or from the beginning, and writes metrics and checkpoints into `folder`."""
    config = session.config
    with stop_requests() as stop_requested, open_checkpoints(folder / CHECKPOINTS, config.files.keep) as manager:
        if goes_on:
            state = restore(manager, state, session.batches)
        header = {"config": asdict(config), **devices.describe(session.mesh)}
        with Recorder(folder, header, resumed_at=int(state.step) if goes_on else None) as recorder:
            return fit(session, state, recorder, manager, stop_requested)


def look(state: TrainState, file: Path) -> None:
    """Writes a table of the BN layers to `file`, and prints it if a layer has a warning."""
    inspection = inspect({"params": state.params, "batch_stats": state.batch_stats}, epsilon=EPSILON)
    file.write_text(f"{inspection}\n")
    if any(row["flags"] for row in inspection.rows):
        print(inspection)


def summary(folder: Path, total: int, seconds: float) -> str:
    """Draws the curves, and returns one line: how the run ended, its accuracy, and where its files are."""
    if not is_first_process():
        return f"process {jax.process_index()} is done"
    lines = jsonl.read(folder / METRICS)
    draw(lines, folder / CURVES)
    step = max(line["step"] for line in lines)
    where = f"{folder}: {METRICS}, {CURVES}, {LAYERS}, {EVENTS}/, {CHECKPOINTS}/"
    if step < total:
        return f"stopped after {step} of {total} steps in {seconds:.1f} s; --resume goes on; files in {where}"
    accuracy = [line["accuracy"] for line in lines if line["kind"] == "eval"][-1]
    skipped = sum(line.get("skipped", 0) > 0 for line in lines)
    left_out = f", of which {skipped} without a finite gradient left out," if skipped else ""
    return f"test accuracy {accuracy:.2%} after {total} steps{left_out} in {seconds:.1f} s; files in {where}"


def is_first_process() -> bool:
    """Returns True in the process that prints and draws for all of them."""
    return jax.process_index() == 0


def main(
    argv: Sequence[str] | None = None,
    *,
    default: Config | None = None,
    prog: str = "python -m experiments.train",
    description: str = __doc__.splitlines()[0],
) -> int:
    """Runs the command line with the given defaults, and returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    config = tyro.cli(
        Config,
        prog=prog,
        description=description,
        args=argv,
        default=default or defaults(smoke="--smoke" in argv),
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )
    try:
        print(run(config), flush=True)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return LOST
    return 0


def leave(status: int) -> NoReturn:
    """Exits the process with this status; without any clean-up after a failed run.

    After a failed write, threads of Orbax wait for up to ten minutes, and after the loss of another process JAX waits
    for it at exit; `os._exit` skips both.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if status == LOST:
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    leave(main())
