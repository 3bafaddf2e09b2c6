"""Builds a character corpus from the source lines of Python's standard library, as padded token sequences.

The modules differ between Python versions, so bits per character do too; `Text.describe` records which corpus was used.
A module is on the same side of the train/test split in every version. Some lines repeat (`return self`), so a few test
lines also occur in training modules: use the corpus to compare networks, not to measure absolute quality.
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

from experiments.data.pipeline import Batch

PADDING = 0
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))  # token 1 is the newline, with which a line begins and ends
VOCABULARY = 1 + len(CHARACTERS)
HELD_BACK = 10  # one module in this many is for testing


class Text(NamedTuple):
    train: np.ndarray  # [N, T + 1] uint8, tokens of a line each: position t is given, t + 1 to be predicted
    test: np.ndarray  # [M, T + 1] uint8

    def describe(self) -> dict[str, Any]:
        """Returns what identifies the corpus: Python version, lines, characters to predict, and a hash over every
        token.
        """
        digest = hashlib.sha256(b"".join(part.tobytes() for part in self)).hexdigest()[:12]
        lines, predicted = (
            [int(n) for n in counts] for counts in (map(len, self), (np.sum(p[:, 1:] > 0) for p in self))
        )
        return {"python": platform.python_version(), "lines": lines, "characters": predicted, "fingerprint": digest}


def corpus(longest: int) -> Text:
    """Builds the corpus from all modules, each line cut after `longest` characters; held-back modules are
    for testing.
    """
    parts: tuple[list[str], list[str]] = ([], [])
    for path in modules():
        parts[is_held_back(path)].extend(lines(path))
    return Text(*(encode(part, longest) for part in parts))


def modules() -> list[Path]:
    """Returns the paths of the standard library's top-level Python modules, without those generated at build time."""
    folder = Path(sysconfig.get_path("stdlib"))
    return sorted(path for path in folder.glob("*.py") if path.stem in sys.stdlib_module_names)


def is_held_back(path: Path) -> bool:
    """Decides by the module's name alone if its lines are for testing, so that all Python versions split alike."""
    return zlib.crc32(path.stem.encode()) % HELD_BACK == 0


def lines(path: Path) -> Iterator[str]:
    """Yields the non-blank lines of a file that hold printable ASCII only, without trailing white space."""
    with tokenize.open(path) as file:
        for line in map(str.rstrip, file):
            if line and line.isascii() and line.isprintable():
                yield line


def encode(texts: Iterable[str], longest: int) -> np.ndarray:
    """Encodes lines as tokens `[N, longest + 1]`: newline, the characters, newline (unless the line was
    cut), padding.
    """
    rows = [f"\n{text}\n"[: longest + 1].ljust(longest + 1, "\0") for text in texts]
    token = np.zeros(128, np.uint8)
    token[[ord(character) for character in CHARACTERS]] = np.arange(1, VOCABULARY)
    return token[np.frombuffer("".join(rows).encode("ascii"), np.uint8)].reshape(len(rows), longest + 1)


def batch(tokens: np.ndarray, width: int | None = None) -> Batch:
    """Makes inputs, labels and weights: the label of a character is the next one, and padding has weight 0.

    Args:
        tokens: `[N, T + 1]`.
        width: positions in the batch; T if None, and a width above T adds padding.

    Returns:
        `{"token", "label", "weight"}`, each `[N, width]`.
    """
    tokens = np.pad(tokens, [(0, 0), (0, width + 1 - tokens.shape[1] if width else 0)], constant_values=PADDING)
    given, following = tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int32)
    return {"token": given, "label": following, "weight": (following != PADDING).astype(np.float32)}


def inputs(batch: Batch) -> tuple[Any, Any]:
    """Returns the arguments of a text model: the tokens, and the weights that are zero at padding."""
    return batch["token"], batch["weight"]


def training_batches(tokens: np.ndarray, batch_size: int, *, seed: int) -> Iterator[Batch]:
    """Yields batches without end, in a new order each epoch; lines that do not fill a last batch are left out."""
    for epoch in count():
        order = np.random.default_rng([seed, epoch]).permutation(len(tokens))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            yield batch(tokens[order[start : start + batch_size]])


def evaluation_batches(tokens: np.ndarray, batch_size: int, width: int | None = None) -> Iterator[Batch]:
    """Yields all lines in order; the last batch is filled up with empty lines, whose weights are zero."""
    tokens = np.pad(tokens, [(0, -len(tokens) % batch_size), (0, 0)], constant_values=PADDING)
    for start in range(0, len(tokens), batch_size):
        yield batch(tokens[start : start + batch_size], width)
