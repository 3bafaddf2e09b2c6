"""Orbax checkpoints of a run: the training state and the place in the data, in one atomic step."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grain
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import LatestN

from experiments.errors import RunError
from experiments.train.loop import TrainState


@contextmanager
def open_checkpoints(folder: Path, keep: int) -> Iterator[ocp.CheckpointManager]:
    """The checkpoints in `folder`, of which the last `keep` stay; leaving the block waits for writes in progress."""
    options = ocp.CheckpointManagerOptions(preservation_policy=LatestN(keep), cleanup_tmp_directories=True)
    with refusals(folder):
        manager = ocp.CheckpointManager(folder.absolute(), options=options)
    try:
        yield manager
    finally:
        with refusals(folder):
            manager.close()


def save(manager: ocp.CheckpointManager, state: TrainState, batches: grain.DatasetIterator) -> None:
    """Saves in the background; the state may be donated at once. A step that is saved already stays as it is."""
    step = int(state.step)
    if step != manager.latest_step():
        # The place in the data is the number of batches taken: the same on every process, so that one may read what
        # two have written (grain.checkpoint keeps a file for each process, and wants as many of them back).
        parts = {"state": ocp.args.StandardSave(state), "batches": ocp.args.JsonSave(batches.get_state())}
        with refusals(manager.directory):
            manager.save(step, args=ocp.args.Composite(**parts))


def restore(manager: ocp.CheckpointManager, state: TrainState, batches: grain.DatasetIterator) -> TrainState:
    """The last saved state, with the types and sharding of `state`; `batches` moves to the saved place.

    `state` itself where nothing was saved yet: the run was killed before its first checkpoint.
    """
    if manager.latest_step() is None:
        return state
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    parts = {"state": ocp.args.StandardRestore(target), "batches": ocp.args.JsonRestore()}
    restored = manager.restore(manager.latest_step(), args=ocp.args.Composite(**parts))
    batches.set_state(restored["batches"])
    return restored["state"]


@contextmanager
def refusals(folder: Path) -> Iterator[None]:
    """Turns whatever the disk refuses into one line: Orbax raises it as an OSError, a ValueError or a RuntimeError."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        cure = "make room, or give back the folder," if jax.process_count() == 1 else "look for a lost process,"
        raise RunError(
            f"a checkpoint cannot be written to {folder} ({reason}). The ones before it are intact: {cure} and "
            "--resume goes on from the last"
        ) from error
