"""The tables of accuracy and speed in the READMEs, here and of the project, made of the committed results.

Command:  python -m experiments.bench.readme             # writes them; --check says whether they are up to date
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench import scaling_fits, scaling_paper

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "bench" / "results"
PEERS = ("flax.linen", "flax.linen, accurate", "flax.nnx", "haiku", "keras", "torch", "torch, channels last")
LARGE = 2_000_000  # elements: 8 MB in float32


def _rows(name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]
    return [line for line in lines if "traffic" in line or "milliseconds" in line]


def compiled() -> str:
    """Traffic and collectives of a layer, per target."""
    norms = ("bnjax", "flax.linen", "flax.linen, accurate")
    lines = [
        "| a layer with ReLU, " + " | ".join(("forward + backward", *norms)) + " |",
        "|---" * (len(norms) + 1) + "|",
    ]
    found = {(row["program"], row["target"], row["norm"]): row for row in _rows("aot")}
    for target in ("v5e:2x2", "v6e:2x2", "h100"):
        cells = [f"{found['layer', target, norm]['traffic']:.1f}" for norm in norms]
        lines.append(f"| {target}: traffic to memory, activations | {' | '.join(cells)} |")
    for target in ("v5e:2x2", "v5e:16x16", "4xh100"):
        cells = [str(len(found["layer, masked", target, norm]["all_reduces"])) for norm in norms]
        lines.append(f"| {target}: all-reduces, masked or not | {' | '.join(cells)} |")
    return "\n".join(lines)


def layers() -> str:
    """How many times as long as bnjax the others take: median over the large shapes, and the range."""
    rows = [row for row in _rows("layers") if np.prod(row["size"]) >= LARGE]
    times = {(r["shape"], r["dtype"], r["mode"], r["peer"]): r["milliseconds"] for r in rows}
    columns = [(mode, dtype) for mode in ("forward", "forward + backward") for dtype in ("float32", "bfloat16")]
    lines = ["| | " + " | ".join(f"{mode}, {dtype}" for mode, dtype in columns) + " |", "|---" * 5 + "|"]
    for peer in PEERS:
        cells = []
        for mode, dtype in columns:
            shapes = {row["shape"] for row in rows}
            ratios = [times[s, dtype, mode, peer] / times[s, dtype, mode, "bnjax"] for s in sorted(shapes)]
            cells.append(f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        lines.append(f"| {peer} | {' | '.join(cells)} |")
    return "\n".join(lines)


def accuracy() -> str:
    """Errors of y in the first step in float32, by how far from zero the data is."""
    norms = ("bnjax", "flax.linen", "flax.linen, accurate", "torch")
    lines = [json.loads(line) for line in (RESULTS / "accuracy.jsonl").read_text().splitlines()]
    found = {(r["peer"], r["ratio"]): r["y"] for r in lines if (r.get("dtype"), r.get("step")) == ("float32", "first")}
    rows = ["| mean/std | " + " | ".join(norms) + " |", "|---" * (len(norms) + 1) + "|"]
    for ratio in (0, 1e2, 1e3, 1e4, 1e5):
        cells = [f"{found[norm, ratio]:.1e}" for norm in norms]
        rows.append(f"| {ratio:g} | {' | '.join(cells)} |")
    return "\n".join(rows)


def scaling() -> str:
    """How a layer's time grows, and what pooling the statistics costs."""
    return scaling_fits.tables(scaling_fits.read(RESULTS / "scaling.jsonl"))


Tables = dict[str, Callable[[], str]]
TABLES: Tables = {"accuracy": accuracy, "compiled": compiled, "layers": layers}
PAGES = {
    ROOT / "README.md": TABLES,
    ROOT / "experiments" / "bench" / "README.md": {"scaling": scaling, "paper": scaling_paper.table},
}


def updated(text: str, tables: Tables = TABLES) -> str:
    """`text` with each table between its markers made anew."""
    for name, table in tables.items():
        begin, end = f"<!-- bench:{name} -->\n", "\n<!-- end -->"
        before, found, rest = text.partition(begin)
        if not found or end not in rest:
            raise ValueError(f"README.md must have a place for the table {name}: {begin!r} ... {end!r}")
        text = before + begin + table() + end + rest.partition(end)[2]
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if a README is out of date")
    check = parser.parse_args().check
    for file, tables in PAGES.items():
        text = file.read_text()
        if check and updated(text, tables) != text:
            sys.exit(f"{file.relative_to(ROOT)} is out of date: run python -m experiments.bench.readme")
        if not check:
            file.write_text(updated(text, tables))


if __name__ == "__main__":
    main()
