"""Shared by the benchmarks: where results lie, the versions they were made with, rows, tables and pages."""

import os
import platform
from collections.abc import Callable, Collection, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from experiments import jsonl

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("bnjax", "jax", "flax", "dm-haiku", "equinox", "keras", "torch", "numpy")
Row = dict[str, Any]


def versions() -> dict[str, str]:
    """Returns the versions of the installed libraries, and the machine."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found | {"python": platform.python_version(), "machine": platform.machine(), "cores": str(os.cpu_count())}


def shown(rows: Iterable[Row], show: Callable[[Row], str]) -> list[Row]:
    """Prints each row as soon as it is measured, and returns all of them."""
    kept = []
    for row in rows:
        print(show(row), flush=True)
        kept.append(row)
    return kept


def timed(row: Row, *names: str) -> str:
    """Returns a line for the terminal: the row's values of `names`, its time, and its ratio to the floor."""
    what = " ".join(f"{row[name]!s:26s}" for name in names)
    return f"{what} {row['milliseconds']:9.3f} ms ± {row['spread']:4.0%}  {row['over_floor']:6.2f} of the floor"


def table(head: Collection[Any], lines: Iterable[Sequence[Any]]) -> str:
    """Returns a Markdown table, without a newline at the end."""
    first, *rest = ("| " + " | ".join(map(str, cells)) + " |" for cells in (head, *lines))
    return "\n".join((first, "|---" * len(head) + "|", *rest))


def keep(
    rows: Sequence[Row], out: Path, command: str, heading: str, text: str, about: dict[str, str] | None = None
) -> None:
    """Writes NAME.jsonl, whose first line holds the versions, and the page NAME.md, which names them too.

    Args:
        rows: the records to write after the one with the versions.
        out: the folder of both files.
        command: the benchmark's module name after `experiments.bench.`; NAME is its last part.
        heading: heading of the page.
        text: text of the page after the sentence that says how it was made.
        about: versions and machine; by default those of this process.
    """
    out.mkdir(parents=True, exist_ok=True)
    name, about = command.rpartition(".")[2], about or versions()
    made = ", ".join(f"{package} {version}" for package, version in about.items())
    jsonl.write(out / f"{name}.jsonl", [about, *rows])
    page = f"# {heading}\n\nMade by `python -m experiments.bench.{command}` with {made}.\n\n{text}"
    (out / f"{name}.md").write_text(page.rstrip("\n") + "\n")


def read(name: str) -> list[Row]:
    """Returns the committed rows of a benchmark, without the first line that holds the versions."""
    return jsonl.read(RESULTS / f"{name}.jsonl")[1:]
