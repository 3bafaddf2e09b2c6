"""Chooses the folder of a run, holds it for this run alone, and checks that every process sees the same one."""

import fcntl
import os
import random
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments import jsonl
from experiments.errors import ConfigError, RunError
from experiments.train.records import CHECKPOINTS, DIGITS, EVENTS, METRICS

HOLDER = "holder.txt"  # which process writes the folder; locked as long as it runs


@contextmanager
def taken(runs: Path, out: Path | None, resume: bool, wait: float) -> Iterator[tuple[Path, bool]]:
    """Takes the folder of this run, as `run_folder` chooses it, and holds it until the end of the block.

    The first process chooses; the others learn what it chose, and check that they see its files.

    Args:
        runs, out, resume: as in `run_folder`.
        wait: seconds after which a file of the first process must be visible in all of them.

    Raises:
        ConfigError: the folder holds another run, or is being written by one, or is on no shared disk.
        OSError: the folder cannot be written.
    """
    with ExitStack() as stack:
        folder, goes_on, token, refusal = None, False, random.randrange(2**31), None
        if jax.process_index() == 0:
            try:
                folder, goes_on = run_folder(runs, out, resume)
                stack.enter_context(held(folder, token))
            except (ConfigError, OSError) as error:
                refusal = error
        if jax.process_count() > 1:
            number = int(folder.name) if folder and not out else 0
            chosen = np.array([number, goes_on, token, refusal is not None], np.int32)
            number, goes_on, token, refused = multihost_utils.broadcast_one_to_all(chosen).tolist()
            folder = out or runs / f"{number:04d}"
            if refused and not refusal:
                refusal = ConfigError(f"process 0 could not take the folder {out or runs}: look for its error")
        if refusal:
            raise refusal
        check_shared(folder, token, wait)
        yield folder, bool(goes_on)


def run_folder(runs: Path, out: Path | None, resume: bool) -> tuple[Path, bool]:
    """Returns the folder of this run, which it makes if need be, and True if the run in it is resumed.

    Args:
        runs: holds the numbered runs 0001, 0002, ...
        out: this folder instead of a numbered one.
        resume: use the folder of the latest run instead of a new one. Without one, a new folder is made, so
            that one command can start a job however often, and however early, it is killed.
    """
    if out:
        goes_on = resume and has_begun(out)
        if not goes_on:
            check_free(out, resume)
            out.mkdir(parents=True, exist_ok=True)
        return out, goes_on
    numbers = sorted(int(path.name) for path in runs.glob("[0-9]*") if path.name.isdigit())
    begun = [runs / f"{number:04d}" for number in numbers if resume and has_begun(runs / f"{number:04d}")]
    if begun:
        return begun[-1], True
    for number in count(max(numbers, default=0) + 1):  # another run may take the same number at this moment
        with suppress(FileExistsError):
            (runs / f"{number:04d}").mkdir(parents=True)
            return runs / f"{number:04d}", False
    raise AssertionError("count never ends")


@contextmanager
def held(folder: Path, token: int) -> Iterator[None]:
    """Locks the folder for this process; the system unlocks it when the process ends, however it ends.

    Raises:
        ConfigError: another process holds it.
    """
    with (folder / HOLDER).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = file.readline().strip()
            raise ConfigError(
                f"{folder} is being written by another run ({who}): wait for it, end it, or choose another --out"
            ) from None
        except OSError as error:  # a disk without locks
            print(f"{folder} cannot be locked ({error.strerror}): start no second run on it", file=sys.stderr)
        file.truncate(0)
        file.write(f"{socket.gethostname()}, pid {os.getpid()}\n{token}\n")
        file.flush()
        yield


def check_shared(folder: Path, token: int, wait: float) -> None:
    """Raises ConfigError in every process if one of them does not see what the first has written into the folder."""
    if jax.process_count() == 1:
        return
    until = time.monotonic() + wait
    while not (seen := sees(folder, token)) and time.monotonic() < until:  # network disks may be late
        time.sleep(0.1)
    everywhere = np.ravel(multihost_utils.process_allgather(np.int32(seen)))
    if not everywhere.all():
        raise ConfigError(
            f"process {int(everywhere.argmin())} does not see the files of process 0 in {folder}: it must be on a disk "
            "that all processes share, under the same path"
        )


def sees(folder: Path, token: int) -> bool:
    """Returns True if the folder is held by the run of this token."""
    try:
        return (folder / HOLDER).read_text().split()[-1:] == [str(token)]
    except OSError:
        return False


def has_begun(folder: Path) -> bool:
    """Returns True if the folder holds the first line of the metrics, which is all that a resume needs."""
    return (folder / METRICS).is_file() and bool(jsonl.read(folder / METRICS))


def check_free(folder: Path, resume: bool) -> None:
    """Raises ConfigError unless the folder is empty.

    With --resume it may hold the files of a run that was killed before its first line.
    """
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    saved = [path for path in (folder / CHECKPOINTS).glob("*") if path.name.isdigit()]
    if saved or found - {HOLDER} - ({METRICS, EVENTS, CHECKPOINTS} if resume else set()):
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
