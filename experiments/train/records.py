"""The folder of a run and what is written there while it trains: JSON lines and TensorBoard events."""

import json
import math
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

from experiments.errors import ConfigError, RunError

METRICS, EVENTS, CHECKPOINTS = "metrics.jsonl", "tensorboard", "checkpoints"
Line = dict[str, Any]


def run_folder(runs: Path, out: Path | None, resume: bool) -> tuple[Path, bool]:
    """The folder of this run, and whether a run is there to go on with: the same on every process.

    Args:
        runs: holds the numbered runs 0001, 0002, ...
        out: this folder instead of a numbered one.
        resume: the folder of the latest run, instead of a new one. Where there is none, a new one all the same, so
            that a job may be started by one and the same command however often it is killed, and however early.
    """
    numbers = sorted(int(path.name) for path in runs.glob("[0-9]*") if path.name.isdigit())
    begun = [number for number in numbers if resume and has_begun(runs / f"{number:04d}")]
    number = begun[-1] if begun else max(numbers, default=0) + 1
    goes_on = resume and (has_begun(out) if out else bool(begun))
    if jax.process_count() > 1:  # also keeps the others back until the first process has looked
        number, goes_on = multihost_utils.broadcast_one_to_all(np.array([number, goes_on])).tolist()
    folder = out or runs / f"{number:04d}"
    if jax.process_index() == 0 and not goes_on:
        check_free(folder, resume)
        folder.mkdir(parents=True, exist_ok=True)
    return folder, bool(goes_on)


def has_begun(folder: Path) -> bool:
    """Whether the first line of the metrics is there: all that a resume needs, with or without a checkpoint."""
    return (folder / METRICS).is_file() and bool(read_lines(folder / METRICS))


def check_free(folder: Path, resume: bool) -> None:
    """A new run wants an empty folder; under --resume, what a start that was killed at once leaves may be there."""
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    saved = [path for path in (folder / CHECKPOINTS).glob("*") if path.name.isdigit()]
    if saved or found - ({METRICS, EVENTS, CHECKPOINTS} if resume else set()):
        cure = f"it holds no {METRICS}" if resume else "add --resume to go on with it"
        raise ConfigError(f"{folder} is not empty: {cure}, or choose another --out")


@contextmanager
def written(folder: Path) -> Iterator[None]:
    """Turns what the disk refuses to take into one line of text."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{folder} cannot be written ({error}). Its checkpoints are intact: make room, or give back the folder, "
            "and --resume goes on from the last"
        ) from error


class Recorder:
    """Appends lines to metrics.jsonl and scalars to TensorBoard. Only the first process writes.

    A line is `{"kind": ..., "step": ..., ...}`; the first one, of kind "config", says how the run was made. After a
    resume, the lines beyond the restored step are gone, so that every step stands there once.
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
        """One line, and one TensorBoard scalar for each number in it."""
        self._append({"kind": kind, "step": step, **values})
        if self._events:
            self._events.write({f"{kind}/{name}": value for name, value in flatten_dict(values, sep="/").items()}, step)

    def flush(self) -> None:
        """Brings everything written so far to the files, which are still there."""
        self._lines.flush()
        if self._events:
            self._events.flush()
        if not self._path.exists():  # an open file goes on taking lines after its folder is gone
            raise FileNotFoundError(f"{self._path} has vanished")

    def _append(self, line: Line) -> None:
        self._lines.write(json.dumps(plain(line), allow_nan=False) + "\n")


class Events:
    """Scalars for TensorBoard. tensorboardX's SummaryWriter would hand them to a thread, which a full disk ends, and
    then wait for that thread for ever; here the caller gets the error."""

    def __init__(self, folder: Path, purge_step: int):
        folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        self._write(purge_step, session_log=SessionLog(status=SessionLog.START))  # hides what a killed run left beyond

    def write(self, values: Mapping[str, Any], step: int) -> None:
        """One event with all the `values`."""
        summaries = [scalar(name, value) for name, value in values.items()]
        merged = summaries[0]
        for summary in summaries[1:]:
            merged.MergeFrom(summary)
        self._write(step, summary=merged)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _write(self, step: int, **content: Any) -> None:
        self._writer.write_event(Event(wall_time=time.time(), step=step, **content))


def plain(value: Any) -> Any:
    """`value` as JSON knows it: numbers of six digits, null for what is not finite, text for paths."""
    if isinstance(value, Mapping):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, (float, np.floating, np.ndarray)):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def read_lines(path: Path) -> list[Line]:
    """The lines of a metrics file, without a last one that a crash cut short."""
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def truncate(path: Path, step: int) -> None:
    """Takes away the lines beyond `step`, in one atomic replacement."""
    kept = [line for line in read_lines(path) if line["step"] <= step]
    shorter = path.with_suffix(".tmp")
    shorter.write_text("".join(json.dumps(line) + "\n" for line in kept))
    shorter.replace(path)


def check_resumable(folder: Path, config: Mapping[str, Any]) -> None:
    """A resumed run must train as it began: compares `config` with the first line of its metrics."""
    recorded, wanted = fixed(read_lines(folder / METRICS)[0]["config"]), fixed(plain(config))
    if different := sorted(name for name in recorded.keys() | wanted.keys() if recorded.get(name) != wanted.get(name)):
        changes = ", ".join(f"{name} {recorded.get(name)} → {wanted.get(name)}" for name in different)
        raise ConfigError(
            f"{folder} was begun with other options ({changes}): repeat them after --resume, or start a new run"
        )


def fixed(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What stays as it is for the life of a run: what its numbers depend on."""
    return {name: value for name, value in config["training"].items() if name != "skip_nonfinite"}
