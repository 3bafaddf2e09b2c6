"""JSON lines: how every experiment keeps what it measured, one object per line."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def text(line: Line, *, digits: int | None = None) -> str:
    """Returns a line as JSON with its newline; `digits` are those of :func:`plain`."""
    return json.dumps(plain(line, digits), allow_nan=False) + "\n"


def parse(content: str) -> list[Line]:
    """Returns the lines of a file's content, without a last one that a crash cut short."""
    return [json.loads(line) for line in content[: content.rfind("\n") + 1].splitlines()]


def read(path: Path) -> list[Line]:
    """Returns the lines of a file, without a last one that a crash cut short."""
    return parse(path.read_text())


def write(path: Path, lines: Iterable[Line]) -> None:
    """Replaces a file by these lines at once: a crash leaves the old file or the new one."""
    new = path.with_suffix(".tmp")
    new.write_text("".join(map(text, lines)))
    new.replace(path)


def append(path: Path, lines: Iterable[Line]) -> None:
    """Adds lines at the end of a file, which need not exist."""
    with path.open("a") as file:
        file.write("".join(map(text, lines)))


def plain(value: Any, digits: int | None = None) -> Any:
    """Returns `value` in the types of JSON: arrays as lists, paths as text, null for a number that is not finite.

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
