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
from pathlib import Path
from typing import NoReturn

import jax
import tyro
from orbax.checkpoint import CheckpointManager
from tqdm import tqdm

from bnjax.tools import inspect
from experiments import jsonl
from experiments.errors import ConfigError, RunError
from experiments.train import devices, nonfinite
from experiments.train.checkpoints import open_checkpoints, restore, save
from experiments.train.cluster.folder import check_resumable, taken, written
from experiments.train.config import Config
from experiments.train.final import EXPORTED, final_state, write_exported
from experiments.train.fingerprint import fingerprint
from experiments.train.loop import Metrics, TrainState, chunks, evaluate
from experiments.train.plots import draw
from experiments.train.recipes import defaults
from experiments.train.records import CHECKPOINTS, EVENTS, METRICS, Recorder
from experiments.train.session import EPSILON, Session, build, join
from experiments.train.stopping import anywhere, stop_requests

CURVES = "curves.png"
LAYERS = "layers.txt"
LOST, REFUSED = 1, 2  # exit statuses: a run that had started failed; the options or files are not usable


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
        since, waited = time.perf_counter(), session.batches.seconds
        trained = chunks(session.train_step, state, session.batches, session.mesh, ends)
        for state, rows in trained:
            took = time.perf_counter() - since
            pace = {
                "images_per_second": len(rows) * session.config.training.batch_size / took,
                "waiting": (session.batches.seconds - waited) / took,
            }
            step, stop = int(state.step), stop_requested()
            record(recorder, bar, step, rows, pace)
            nonfinite.check(rows, step, session.config.training.skip_nonfinite)
            if step % session.epoch == 0:
                measure(session, state, recorder)
            if stop or step == last or any(step % steps == 0 for steps in saves):
                recorder.flush()
                save(manager, state, session.batches)
            if stop:
                break
            since, waited = time.perf_counter(), session.batches.seconds
        if int(state.step) == session.total:
            finish(session, state, recorder)
    return state


def chunk_ends(first: int, last: int, *intervals: int) -> list[int]:
    """Returns the steps in (first, last] that are a multiple of one of the intervals, and `last` itself."""
    return [step for step in range(first + 1, last + 1) if step == last or any(step % n == 0 for n in intervals)]


def record(recorder: Recorder, bar: tqdm, step: int, rows: list[Metrics], pace: dict[str, float]) -> None:
    """Writes the metrics of the steps up to `step`, and shows the last of them in the progress bar.

    `pace` holds the images per second of all processes, and the share of the time that this one has waited for data;
    while it waits, its devices may still compute. The first images/s of a run includes compilation.
    """
    for number, row in enumerate(rows, start=step - len(rows) + 1):
        recorder.write("train", number, **row)
    recorder.write("speed", step, **pace)
    bar.update(len(rows))
    learnt = f"loss {rows[-1]['loss']:.4f}, accuracy {rows[-1]['accuracy']:.3f}"
    bar.set_postfix_str(f"{learnt}, {pace['images_per_second']:.0f} images/s, {pace['waiting']:.0%} waiting for data")


def measure(session: Session, state: TrainState, recorder: Recorder) -> None:
    """Evaluates on the test images with the running averages, and records loss and accuracy."""
    step, result = int(state.step), tested(session, state)
    recorder.write("eval", step, **result)
    if is_first_process():
        tqdm.write(f"epoch {step // session.epoch}: test loss {result['loss']:.4f}, accuracy {result['accuracy']:.2%}")


def tested(session: Session, state: TrainState) -> Metrics:
    """Returns loss and accuracy on the test images."""
    batches = session.data.evaluation(session.config.training.batch_size, session.shard)
    return evaluate(session.eval_step, state, batches, session.mesh)


def finish(session: Session, state: TrainState, recorder: Recorder) -> None:
    """Evaluates the averaged and recalibrated network, and exports it, each where the options ask for it."""
    training, last = session.config.training, final_state(session, state)
    if training.ema or training.recalibrate:
        recorder.write("final", int(state.step), **tested(session, last))
    if session.config.files.export and is_first_process():
        difference = write_exported(session, last, recorder.folder / EXPORTED)
        recorder.write("export", int(state.step), difference=difference)
    anywhere(False)  # the others wait for the first process, which has more to do


def run(config: Config) -> str:
    """Trains, draws the curves, and returns the last line to print."""
    started = time.perf_counter()
    data = join(config)
    session, state = build(config, data)
    files = config.files
    with (
        written(files.out or files.runs),
        taken(files.runs, files.out, files.resume, config.hardware.join_timeout) as (folder, goes_on),
    ):
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
    exported = f"{EXPORTED}, " if (folder / EXPORTED).exists() else ""
    where = f"{folder}: {METRICS}, {CURVES}, {LAYERS}, {exported}{EVENTS}/, {CHECKPOINTS}/"
    if step < total:
        return f"stopped after {step} of {total} steps in {seconds:.1f} s; --resume goes on; files in {where}"
    accuracy = [line["accuracy"] for line in lines if line["kind"] in ("eval", "final")][-1]
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
    try:
        config = tyro.cli(
            Config,
            prog=prog,
            description=description,
            args=argv,
            default=default or defaults(argv),
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        )
        print(run(config), flush=True)
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")  # one write, which text of other threads cannot split
        return REFUSED
    except RunError as error:
        sys.stderr.write(f"error: {error}\n")
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
