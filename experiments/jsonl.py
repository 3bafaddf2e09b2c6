"""Reads and writes JSON lines, one object per line: the format in which every experiment keeps its measurements."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def text(line: Line, *, digits: int | None = None) -> str:
    """Returns a record as one line of JSON that ends in a newline; floats keep `digits` significant digits, or all of
    them.
    """
    return json.dumps(plain(line, digits), allow_nan=False) + "\n"


def parse(content: str) -> list[Line]:
    """Returns the records in the content of a file, without a last line that a crash cut short."""
    return [json.loads(line) for line in content[: content.rfind("\n") + 1].splitlines()]


def read(path: Path) -> list[Line]:
    """Returns the records of a file, without a last line that a crash cut short."""
    return parse(path.read_text())


def write(path: Path, lines: Iterable[Line]) -> None:
    """Replaces the content of a file by these records, atomically: after a crash the file is the old one or the new
    one.
    """
    new = path.with_suffix(".tmp")
    new.write_text("".join(map(text, lines)))
    new.replace(path)


def append(path: Path, lines: Iterable[Line]) -> None:
    """Appends records to a file, which is created if it does not exist."""
    with path.open("a") as file:
        file.write("".join(map(text, lines)))


def plain(value: Any, digits: int | None = None) -> Any:
    """Converts a value to JSON types: arrays become lists, paths become text, numbers that are not finite become null.

    Args:
        value: numbers, text, paths, arrays of NumPy or JAX, and mappings and sequences of these.
        digits: significant digits of a float; None keeps all of them.
    """
    if isinstance(value, Mapping):
        return {name: plain(part, digits) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part, digits) for part in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist(), digits)
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return float(f"{value:.{digits}g}") if digits else value
    return value
