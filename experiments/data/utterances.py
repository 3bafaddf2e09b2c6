"""Reads JapaneseVowels: nine men say the vowels a and e, as frames of 12 cepstrum coefficients of linear prediction.

Kudo, Toyama & Shimbo 1999, "Multidimensional curve classification using passing-through regions". The two files lie in
the packages sktime and aeon, of which nothing is imported: `pip install sktime`, or `pip install --no-deps aeon`.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.errors import ConfigError

PACKAGES = ("sktime", "aeon")
INSIDE = Path("datasets", "data", "JapaneseVowels")  # of both packages
NAME = "JapaneseVowels_{}.ts"
COEFFICIENTS, SPEAKERS = 12, 9
HOW_TO_GET = (
    "JapaneseVowels_TRAIN.ts and JapaneseVowels_TEST.ts come with `pip install sktime`, or without anything else with "
    "`pip install --no-deps aeon`; or give their folder with --data-dir"
)


class Utterances(NamedTuple):
    frames: np.ndarray  # [N, T, 12] float32, zero after the last frame of an utterance
    lengths: np.ndarray  # [N] int32, 7 to 29
    speakers: np.ndarray  # [N] int32, 0 to 8


def load(folder: Path) -> tuple[Utterances, Utterances]:
    """Loads the 270 utterances for training and the 370 for testing, from `folder` or from an installed package."""
    packages = [Path(spec.origin).parent / INSIDE for name in PACKAGES if (spec := find_spec(name)) and spec.origin]
    for place in (folder, *packages):
        if (place / NAME.format("TRAIN")).is_file():
            train, test = (read(place / NAME.format(part)) for part in ("TRAIN", "TEST"))
            return train, test
    raise ConfigError(f"found no {NAME.format('TRAIN')} in {folder} nor in a package. {HOW_TO_GET}")


def read(path: Path) -> Utterances:
    """Reads a file: after the line `@data` each line is an utterance, `values of a coefficient:...:speaker`."""
    try:
        lines = path.read_text().splitlines()
        rows = [line.split(":") for line in lines[lines.index("@data") + 1 :]]
        each = [np.array([series.split(",") for series in row[:-1]], np.float32).T for row in rows]
        speakers = np.array([row[-1] for row in rows], np.int32) - 1
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): truncated or damaged? {HOW_TO_GET}") from error
    if not rows or {frames.shape[1:] for frames in each} != {(COEFFICIENTS,)} or set(speakers) - set(range(SPEAKERS)):
        raise ConfigError(
            f"{path}: expected utterances of {COEFFICIENTS} coefficients by {SPEAKERS} speakers. {HOW_TO_GET}"
        )
    lengths = np.array([len(frames) for frames in each], np.int32)
    return Utterances(np.stack([longer(frames, lengths.max()) for frames in each]), lengths, speakers)


def longer(frames: np.ndarray, count: int) -> np.ndarray:
    """Pads frames `[T, 12]` with zeros to `count` of them."""
    return np.pad(frames, [(0, count - len(frames)), (0, 0)])
