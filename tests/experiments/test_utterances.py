"""Tests that JapaneseVowels is read as it was published, and that missing and damaged files are named with the cure."""

from pathlib import Path

import numpy as np
import pytest

from experiments.data import utterances
from experiments.errors import ConfigError

NOWHERE = Path("no such folder")
ROW = ":".join(["1.5,2.5"] * 12) + ":9"


def written(folder: Path, *rows: str) -> Path:
    """Writes a file with these utterances."""
    path = folder / utterances.NAME.format("TRAIN")
    path.write_text("\n".join(["#A comment", "@problemName JapaneseVowels", "@data", *rows]))
    return path


def test_the_utterances_are_those_of_the_publication() -> None:
    """Checks the counts and the first frame that the UCI archive publishes."""
    train, test = utterances.load(NOWHERE)
    np.testing.assert_array_equal(np.bincount(train.speakers), [30] * 9)
    np.testing.assert_array_equal(np.bincount(test.speakers), [31, 35, 88, 44, 29, 24, 40, 50, 29])
    assert train.frames.shape == (270, 26, 12) and test.frames.shape == (370, 29, 12)
    first = [1.860936, -0.207383, 0.261557, -0.214562, -0.171253, -0.118167]
    np.testing.assert_allclose(train.frames[0, 0, :6], first, rtol=1e-6)
    assert (train.lengths.min(), train.lengths.max()) == (7, 26) and (test.lengths.min(), test.lengths.max()) == (7, 29)


def test_after_the_last_frame_there_are_zeros() -> None:
    for part in utterances.load(NOWHERE):
        there = np.arange(part.frames.shape[1])[None] < part.lengths[:, None]
        assert not np.any(part.frames[~there]) and np.all(np.any(part.frames[there], axis=-1))


def test_the_folder_comes_before_the_packages(tmp_path: Path) -> None:
    (tmp_path / utterances.NAME.format("TEST")).write_text(written(tmp_path, ROW, ROW).read_text())
    train, test = utterances.load(tmp_path)
    assert train.frames.shape == test.frames.shape == (2, 2, 12) and train.speakers[0] == 8


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROW, ROW[: len(ROW) // 2]], "cannot be read"),
        ([ROW.replace("2.5", "x", 1)], "cannot be read"),
        ([ROW.replace("1.5,", "", 1)], "cannot be read"),
        ([], "expected utterances of 12"),
        ([ROW.split(":", 1)[1]], "expected utterances of 12"),
        ([ROW[:-1] + "10"], "9 speakers"),
    ],
)
def test_damage_is_named_with_the_cure(tmp_path: Path, rows: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        utterances.read(written(tmp_path, *rows))
    assert "pip install sktime" in str(error.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utterances, "PACKAGES", ("no_such_package",))
    with pytest.raises(ConfigError, match=r"pip install sktime.*--data-dir"):
        utterances.load(NOWHERE)
