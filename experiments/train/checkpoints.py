"""Saves and restores Orbax checkpoints of a run: the training state and the position in the data, in one
atomic step.
"""

import asyncio
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path

import grain
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import LatestN

from experiments.errors import RunError
from experiments.train.loop import TrainState
from experiments.train.stopping import anywhere


@contextmanager
def open_checkpoints(folder: Path, keep: int) -> Iterator[ocp.CheckpointManager]:
    """Opens the checkpoints in `folder` and keeps the last `keep` of them; on exit, waits for writes in progress."""
    options = ocp.CheckpointManagerOptions(preservation_policy=LatestN(keep), cleanup_tmp_directories=True)
    with tracebacks_left_out():
        with refusals(folder):
            manager = ocp.CheckpointManager(folder.absolute(), options=options)
        try:
            yield manager
        finally:
            with refusals(folder):
                manager.close()


@contextmanager
def tracebacks_left_out() -> Iterator[None]:
    """Leaves out the log records of Orbax that hold an exception.

    Orbax logs an exception in every thread through which it passes, 250 lines for a full disk, and then raises it in
    the caller, where it becomes one line.
    """
    logger = logging.getLogger("absl")

    def kept(record: logging.LogRecord) -> bool:
        return not record.exc_info

    logger.addFilter(kept)
    try:
        yield
    finally:
        logger.removeFilter(kept)


def save(manager: ocp.CheckpointManager, state: TrainState, batches: grain.DatasetIterator) -> None:
    """Saves a checkpoint in the background, unless this step has one already.

    The buffers of `state` may be donated as soon as this returns.
    """
    step = int(state.step)
    if step != manager.latest_step():
        # The position in the data is the number of batches read, equal in every process, so that one process can
        # restore what two have saved (grain.checkpoint writes one file per process and must read as many).
        parts = {"state": ocp.args.StandardSave(state), "batches": ocp.args.JsonSave(batches.get_state())}
        with refusals(manager.directory):
            manager.save(step, args=ocp.args.Composite(**parts))


def restore(manager: ocp.CheckpointManager, state: TrainState, batches: grain.DatasetIterator) -> TrainState:
    """Restores the last saved state with the types and sharding of `state`, and moves `batches` to the saved position.

    A checkpoint that cannot be read is set aside, as `damaged-STEP`, and the one before it is restored. Returns `state`
    itself if nothing was saved yet, because the run was killed before its first checkpoint.

    Raises:
        RunError: none of the checkpoints can be read.
    """
    steps, target = sorted(manager.all_steps(), reverse=True), jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    parts = {"state": ocp.args.StandardRestore(target), "batches": ocp.args.JsonRestore()}
    for step in steps:
        restored, reason = None, "in another process"
        try:
            restored = manager.restore(step, args=ocp.args.Composite(**parts))
        except Exception as error:  # Orbax raises whatever the damaged file brings about
            reason = " ".join(str(error).split())[:300] or type(error).__name__
        if not anywhere(restored is None):
            batches.set_state(restored["batches"])
            set_aside(manager, [later for later in steps if later > step])
            return restored["state"]
        if jax.process_index() == 0:
            print(f"checkpoint {step} cannot be read ({reason}): going back to the one before it", file=sys.stderr)
    if steps:
        raise RunError(
            f"no checkpoint in {manager.directory} can be read: restore one from a copy, or start a new run with "
            "another --out"
        )
    return state


def set_aside(manager: ocp.CheckpointManager, steps: Sequence[int]) -> None:
    """Renames checkpoints that cannot be read, so that their steps can be saved again."""
    if not steps:
        return
    if jax.process_index() == 0:
        for step in steps:
            (manager.directory / str(step)).rename(free(manager.directory / f"damaged-{step}"))
    anywhere(False)  # the others wait until it is done
    manager.reload()


def free(path: Path) -> Path:
    """Returns the path, or with a number behind it the first one that is not there."""
    names = chain([path], (path.with_name(f"{path.name}-{number}") for number in count(2)))
    return next(name for name in names if not name.exists())


@contextmanager
def refusals(folder: Path) -> Iterator[None]:
    """Converts any error of a write into a RunError of one line.

    Orbax raises OSError, ValueError or RuntimeError, or asyncio.CancelledError, with which it ends its other threads.
    """
    try:
        yield
    except (Exception, asyncio.CancelledError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        cure = "free disk space, or restore the folder," if jax.process_count() == 1 else "look for a lost process,"
        raise RunError(
            f"a checkpoint cannot be written to {folder} ({reason}). The ones before it are intact: {cure} and "
            "--resume goes on from the last"
        ) from error
