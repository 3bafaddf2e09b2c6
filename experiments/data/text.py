"""Characters: the lines of Python's own standard library, which every installation has, as padded sequences.

The modules differ between versions of Python, and bits per character with them: `Text.describe` says which corpus it
was. A module is on the same side of the split in every version. Lines repeat (`return self`), so some test lines occur
in training modules as well: this corpus compares networks, it does not measure how well one knows Python.
"""

import hashlib
import platform
import sys
import sysconfig
import tokenize
import zlib
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.train.loop import Batch

PADDING = 0
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))  # token 1 is the newline, with which a line begins and ends
VOCABULARY = 1 + len(CHARACTERS)
HELD_BACK = 10  # of so many modules, one is for testing


class Text(NamedTuple):
    train: np.ndarray  # [N, T + 1] uint8, tokens of a line each: position t is given, t + 1 to be predicted
    test: np.ndarray  # [M, T + 1] uint8

    def describe(self) -> dict[str, Any]:
        """Which corpus it is: lines, characters to predict, and a text that depends on every one of them."""
        digest = hashlib.sha256(b"".join(part.tobytes() for part in self)).hexdigest()[:12]
        lines, predicted = (
            [int(n) for n in counts] for counts in (map(len, self), (np.sum(p[:, 1:] > 0) for p in self))
        )
        return {"python": platform.python_version(), "lines": lines, "characters": predicted, "fingerprint": digest}


def corpus(longest: int) -> Text:
    """The lines of all modules: those of the held-back ones for testing; each cut after `longest` characters."""
    parts: tuple[list[str], list[str]] = ([], [])
    for path in modules():
        parts[is_held_back(path)].extend(lines(path))
    return Text(*(encode(part, longest) for part in parts))


def modules() -> list[Path]:
    """The top-level modules of the standard library that are written in Python, without what is made at its build."""
    folder = Path(sysconfig.get_path("stdlib"))
    return sorted(path for path in folder.glob("*.py") if path.stem in sys.stdlib_module_names)


def is_held_back(path: Path) -> bool:
    """By the name alone, so that other versions of Python split alike."""
    return zlib.crc32(path.stem.encode()) % HELD_BACK == 0


def lines(path: Path) -> Iterator[str]:
    """Lines of printable ASCII, without the blank ones."""
    with tokenize.open(path) as file:
        for line in map(str.rstrip, file):
            if line and line.isascii() and line.isprintable():
                yield line


def encode(texts: Iterable[str], longest: int) -> np.ndarray:
    """`[N, longest + 1]` tokens: a newline, the line, and a newline unless it was cut; then padding."""
    rows = [f"\n{text}\n"[: longest + 1].ljust(longest + 1, "\0") for text in texts]
    token = np.zeros(128, np.uint8)
    token[[ord(character) for character in CHARACTERS]] = np.arange(1, VOCABULARY)
    return token[np.frombuffer("".join(rows).encode("ascii"), np.uint8)].reshape(len(rows), longest + 1)


def batch(tokens: np.ndarray, width: int | None = None) -> Batch:
    """Each character with the one after it, and weight 0 where there is none.

    Args:
        tokens: `[N, T + 1]`.
        width: of the batch; T if None, and with more than T, that much more padding.

    Returns:
        `{"token", "label", "weight"}`, each `[N, width]`.
    """
    tokens = np.pad(tokens, [(0, 0), (0, width + 1 - tokens.shape[1] if width else 0)], constant_values=PADDING)
    given, following = tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int32)
    return {"token": given, "label": following, "weight": (following != PADDING).astype(np.float32)}


def inputs(batch: Batch) -> tuple[Any, Any]:
    """What a model for text is called with: tokens, and where something is to be predicted."""
    return batch["token"], batch["weight"]


def training_batches(tokens: np.ndarray, batch_size: int, *, seed: int) -> Iterator[Batch]:
    """Without an end, in a new order in each epoch; a remainder that fills no batch is left out of that epoch."""
    for epoch in count():
        order = np.random.default_rng([seed, epoch]).permutation(len(tokens))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            yield batch(tokens[order[start : start + batch_size]])


def evaluation_batches(tokens: np.ndarray, batch_size: int, width: int | None = None) -> Iterator[Batch]:
    """In order; the last one is filled up with empty lines, where nothing is to be predicted."""
    tokens = np.pad(tokens, [(0, -len(tokens) % batch_size), (0, 0)], constant_values=PADDING)
    for start in range(0, len(tokens), batch_size):
        yield batch(tokens[start : start + batch_size], width)
