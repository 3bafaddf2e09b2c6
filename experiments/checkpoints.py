"""Orbax checkpoints of a run: the training state and the place in the data, in one atomic step."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grain
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import LatestN

from experiments.errors import ConfigError
from experiments.loop import TrainState


@contextmanager
def open_checkpoints(folder: Path, keep: int) -> Iterator[ocp.CheckpointManager]:
    """The checkpoints in `folder`, of which the last `keep` stay; leaving the block waits for writes in progress."""
    options = ocp.CheckpointManagerOptions(preservation_policy=LatestN(keep), cleanup_tmp_directories=True)
    with ocp.CheckpointManager(folder.absolute(), options=options) as manager:
        yield manager


def save(manager: ocp.CheckpointManager, state: TrainState, batches: grain.DatasetIterator) -> None:
    """Saves in the background; the state may be donated at once. A step that is saved already stays as it is."""
    step = int(state.step)
    if step != manager.latest_step():
        parts = {"state": ocp.args.StandardSave(state), "batches": grain.checkpoint.CheckpointSave(batches)}
        manager.save(step, args=ocp.args.Composite(**parts))


def restore(manager: ocp.CheckpointManager, state: TrainState, batches: grain.DatasetIterator) -> TrainState:
    """The last saved state, with the types and sharding of `state`; `batches` moves to the saved place."""
    if manager.latest_step() is None:
        raise ConfigError(f"nothing to resume: {manager.directory} holds no checkpoint; start again without --resume")
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    parts = {"state": ocp.args.StandardRestore(target), "batches": grain.checkpoint.CheckpointRestore(batches)}
    return manager.restore(manager.latest_step(), args=ocp.args.Composite(**parts))["state"]
