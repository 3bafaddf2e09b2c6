"""Creates the folder of a run and writes its metrics there, as JSON lines and as TensorBoard events."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax
from flax.traverse_util import flatten_dict
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from experiments import jsonl

METRICS, EVENTS, CHECKPOINTS = "metrics.jsonl", "tensorboard", "checkpoints"
DIGITS = 6  # significant digits of a number in the metrics


class Recorder:
    """Appends lines to metrics.jsonl and scalars to TensorBoard. Only the first process writes.

    A line is `{"kind": ..., "step": ..., ...}`; the first one, of kind "config", holds the options of the run. A resume
    removes the lines after the restored step, so that every step is recorded once.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any], resumed_at: int | None = None):
        writes, self.folder = jax.process_index() == 0, folder
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
