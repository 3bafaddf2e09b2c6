"""Creates the folder of a run and writes its metrics there, as JSON lines and as TensorBoard events."""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from experiments import jsonl
from experiments.errors import ConfigError, RunError

METRICS, EVENTS, CHECKPOINTS = "metrics.jsonl", "tensorboard", "checkpoints"
DIGITS = 6  # significant digits of a number in the metrics


def run_folder(runs: Path, out: Path | None, resume: bool) -> tuple[Path, bool]:
    """Returns the folder of this run, and True if it is resumed; both are the same in every process.

    Args:
        runs: holds the numbered runs 0001, 0002, ...
        out: this folder instead of a numbered one.
        resume: use the folder of the latest run instead of a new one. Without one, a new folder is made, so
            that one command can start a job however often, and however early, it is killed.
    """
    numbers = sorted(int(path.name) for path in runs.glob("[0-9]*") if path.name.isdigit())
    begun = [number for number in numbers if resume and has_begun(runs / f"{number:04d}")]
    number = begun[-1] if begun else max(numbers, default=0) + 1
    goes_on = resume and (has_begun(out) if out else bool(begun))
    if jax.process_count() > 1:  # also makes the others wait until the first process has looked
        number, goes_on = multihost_utils.broadcast_one_to_all(np.array([number, goes_on])).tolist()
    folder = out or runs / f"{number:04d}"
    if jax.process_index() == 0 and not goes_on:
        check_free(folder, resume)
        folder.mkdir(parents=True, exist_ok=True)
    return folder, bool(goes_on)


def has_begun(folder: Path) -> bool:
    """Returns True if the folder holds the first line of the metrics, which is all that a resume needs."""
    return (folder / METRICS).is_file() and bool(jsonl.read(folder / METRICS))


def check_free(folder: Path, resume: bool) -> None:
    """Raises ConfigError unless the folder is empty.

    With --resume it may hold the files of a run that was killed before its first line.
    """
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    saved = [path for path in (folder / CHECKPOINTS).glob("*") if path.name.isdigit()]
    if saved or found - ({METRICS, EVENTS, CHECKPOINTS} if resume else set()):
        cure = f"it holds no {METRICS}" if resume else "add --resume to go on with it"
        raise ConfigError(f"{folder} is not empty: {cure}, or choose another --out")


@contextmanager
def written(folder: Path) -> Iterator[None]:
    """Converts an error of a write (disk full, folder gone) into a RunError of one line."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{folder} cannot be written ({error}). Its checkpoints are intact: free disk space or restore the "
            "folder, and --resume goes on from the last"
        ) from error


class Recorder:
    """Appends lines to metrics.jsonl and scalars to TensorBoard. Only the first process writes.

    A line is `{"kind": ..., "step": ..., ...}`; the first one, of kind "config", holds the options of the run. A resume
    removes the lines after the restored step, so that every step is recorded once.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any], resumed_at: int | None = None):
        writes = jax.process_index() == 0
        if writes and resumed_at is not None:
            truncate(folder / METRICS, resumed_at)
        first = 0 if resumed_at is None else resumed_at
        self._path = folder / METRICS if writes else Path(os.devnull)
        self._lines = self._path.open("w" if resumed_at is None else "a")
        self._events = Events(folder / EVENTS, purge_step=first + 1) if writes else None
        self._append({"kind": "config" if resumed_at is None else "resume", "step": first, **header})
        self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._lines.close()
        finally:
            if self._events:
                self._events.close()

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Writes one line, and one TensorBoard scalar for each number in it."""
        self._append({"kind": kind, "step": step, **values})
        if self._events:
            self._events.write({f"{kind}/{name}": value for name, value in flatten_dict(values, sep="/").items()}, step)

    def flush(self) -> None:
        """Flushes everything written so far to disk; raises FileNotFoundError if the file is gone."""
        self._lines.flush()
        if self._events:
            self._events.flush()
        if not self._path.exists():  # writing to an open file succeeds even after its folder was deleted
            raise FileNotFoundError(f"{self._path} has vanished")

    def _append(self, line: jsonl.Line) -> None:
        """Writes one line to the metrics."""
        self._lines.write(jsonl.text(line, digits=DIGITS))


class Events:
    """Writes scalars for TensorBoard, and raises the error of a failed write in the caller.

    SummaryWriter of tensorboardX writes in a thread, which dies on a full disk and then makes the program wait for it
    for ever.
    """

    def __init__(self, folder: Path, purge_step: int):
        folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        self._write(purge_step, session_log=SessionLog(status=SessionLog.START))  # hides later events of a killed run

    def write(self, values: Mapping[str, Any], step: int) -> None:
        """Writes one event that holds all the `values`."""
        summaries = [scalar(name, value) for name, value in values.items()]
        merged = summaries[0]
        for summary in summaries[1:]:
            merged.MergeFrom(summary)
        self._write(step, summary=merged)

    def flush(self) -> None:
        """Flushes the events to disk."""
        self._writer.flush()

    def close(self) -> None:
        """Closes the file of events."""
        self._writer.close()

    def _write(self, step: int, **content: Any) -> None:
        """Writes one event with the current time."""
        self._writer.write_event(Event(wall_time=time.time(), step=step, **content))


def truncate(path: Path, step: int) -> None:
    """Removes the lines after `step`, by replacing the file atomically."""
    jsonl.write(path, [line for line in jsonl.read(path) if line["step"] <= step])


def check_resumable(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises ConfigError if `config` differs from the recorded one in an option that changes the numbers."""
    recorded, wanted = fixed(jsonl.read(folder / METRICS)[0]["config"]), fixed(jsonl.plain(config, DIGITS))
    if different := sorted(name for name in recorded.keys() | wanted.keys() if recorded.get(name) != wanted.get(name)):
        changes = ", ".join(f"{name} {recorded.get(name)} → {wanted.get(name)}" for name in different)
        raise ConfigError(
            f"{folder} was begun with other options ({changes}): repeat them after --resume, or start a new run"
        )


def fixed(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the options that a resumed run must repeat, because its numbers depend on them."""
    return {name: value for name, value in config["training"].items() if name != "skip_nonfinite"}
