"""The folder of a run and what is written there while it trains: JSON lines and TensorBoard events."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from tensorboardX import SummaryWriter

from experiments.errors import ConfigError

METRICS = "metrics.jsonl"
Line = dict[str, Any]


def run_folder(runs: Path, out: Path | None, resume: bool) -> Path:
    """The folder of this run, the same on every process.

    Args:
        runs: holds the numbered runs 0001, 0002, ...
        out: this folder instead of a numbered one.
        resume: the folder of the latest run, instead of a new one.
    """
    numbered = [path for path in runs.glob("[0-9]*") if path.name.isdigit()]
    usable = [int(path.name) for path in numbered if not resume or (path / METRICS).is_file()]
    number = max(usable, default=0) + (not resume)
    if jax.process_count() > 1:  # also keeps the others back until the first process has looked
        number = int(multihost_utils.broadcast_one_to_all(np.int32(number)))
    folder = out or runs / f"{number:04d}"
    if resume and not (folder / METRICS).is_file():
        raise ConfigError(f"nothing to resume: {out or runs} holds no run; start one without --resume")
    if jax.process_index() == 0 and not resume:
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"{folder} is not empty: add --resume to go on with it, or choose another --out")
        folder.mkdir(parents=True, exist_ok=True)
    return folder


class Recorder:
    """Appends lines to metrics.jsonl and scalars to TensorBoard. Only the first process writes.

    A line is `{"kind": ..., "step": ..., ...}`; the first one, of kind "config", says how the run was made. After a
    resume, the lines beyond the restored step are gone, so that every step stands there once.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any], resumed_at: int | None = None):
        writes = jax.process_index() == 0
        if writes and resumed_at is not None:
            truncate(folder / METRICS, resumed_at)
        self._lines = (folder / METRICS).open("a") if writes else open(os.devnull, "w")  # noqa: SIM115  closed in __exit__
        first = 0 if resumed_at is None else resumed_at
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=first + 1, write_to_disk=writes)
        self._append({"kind": "config" if resumed_at is None else "resume", "step": first, **header})
        self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._events.close()

    def write(self, kind: str, step: int, **values: Any) -> None:
        """One line, and one TensorBoard scalar for each number in it."""
        self._append({"kind": kind, "step": step, **values})
        for name, value in flatten_dict(values, sep="/").items():
            self._events.add_scalar(f"{kind}/{name}", value, step)

    def flush(self) -> None:
        """Brings everything written so far to the files."""
        self._lines.flush()
        self._events.flush()

    def _append(self, line: Line) -> None:
        self._lines.write(json.dumps(plain(line), allow_nan=False) + "\n")


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
    """What stays as it is for the life of a run: the training, and the number of processes that its data is cut for."""
    return {**config["training"], "processes": config["hardware"]["processes"]}
