"""Tests that a damaged checkpoint is set aside, and that training goes on from the one before it."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.errors import RunError
from experiments.train.checkpoints import open_checkpoints, restore, save
from experiments.train.loop import TrainState


class Place:
    """Stands for the position in the data."""

    def __init__(self) -> None:
        self.position = 0

    def get_state(self) -> dict[str, int]:
        return {"position": self.position}

    def set_state(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def state(step: int) -> TrainState:
    values = jnp.asarray(np.random.default_rng(step).normal(size=(64, 64)), jnp.float32)
    return TrainState(jnp.int32(step), {"kernel": values}, {"mean": jnp.full(3, step, jnp.float32)}, ())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with the checkpoints of steps 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with open_checkpoints(folder, keep=3) as manager:
        for step in (1, 2, 3):
            place = Place()
            place.position = 10 * step
            save(manager, state(step), place)
    return folder


def shortened(folder: Path) -> None:
    """Cuts every file to half, as a full disk does."""
    for path in files(folder):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zeroed(folder: Path) -> None:
    """Fills every file with zeros, as a power failure does."""
    for path in files(folder):
        path.write_bytes(bytes(path.stat().st_size))


def without_data(folder: Path) -> None:
    """Removes the arrays."""
    shutil.rmtree(folder / "state")


def without_place(folder: Path) -> None:
    """Removes the position in the data."""
    shutil.rmtree(folder / "batches")


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]


def look(folder: Path) -> tuple[TrainState, Any]:
    """Restores what can be restored; returns the state and the position in the data."""
    place = Place()
    with open_checkpoints(folder, keep=3) as manager:
        found = restore(manager, state(0), place)
        if found.step < 3:  # a run comes to step 3 again
            save(manager, found._replace(step=jnp.int32(3)), place)
    return found, place.position


@pytest.mark.parametrize("damage", [shortened, zeroed, without_data, without_place])
def test_the_newest_is_damaged(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    folder = shutil.copytree(saved, tmp_path / "checkpoints")
    damage(folder / "3")
    found, position = look(folder)
    assert (int(found.step), position) == (2, 20)
    np.testing.assert_array_equal(found.params["kernel"], state(2).params["kernel"])
    assert re.match(r"checkpoint 3 cannot be read \(.+\): going back to the one before it$", capsys.readouterr().err)
    assert (folder / "damaged-3").is_dir() and (folder / "3").is_dir()
    assert int(look(folder)[0].step) == 3


def test_all_are_damaged(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "checkpoints")
    for step in ("1", "2", "3"):
        shortened(folder / step)
    with pytest.raises(RunError, match=r"no checkpoint in .* can be read"):
        look(folder)
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["1", "2", "3"]


def test_none_is_damaged(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert int(look(shutil.copytree(saved, tmp_path / "checkpoints"))[0].step) == 3
    assert not capsys.readouterr().err
