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

from experiments.bench.clock.scaling import fits, paper

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "bench" / "results"
PEERS = ("flax.linen", "flax.linen, accurate", "flax.nnx", "haiku", "keras", "torch", "torch, channels last")
LARGE = 2_000_000  # elements: 8 MB in float32


def _rows(name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]
    return [line for line in lines if "traffic" in line or "milliseconds" in line]


def compiled() -> str:
    """Traffic and collectives of a layer, and of a training step of ResNet-50, per target."""
    norms = ("bnjax", "flax.linen", "flax.linen, accurate")
    found = {(row["program"], row["target"], row["norm"]): row for row in _rows("aot")}

    traffic = lambda row: f"{row['traffic']:.1f}"  # noqa: E731
    number = lambda row: str(len(row["all_reduces"]))  # noqa: E731
    asked = [
        *((t, "a layer with ReLU, activations of traffic", "layer", traffic) for t in ("v5e:2x2", "v6e:2x2", "h100")),
        ("h100", "the same with a mask", "layer, masked", traffic),
        *(
            (t, "a layer's all-reduces, masked or not", "layer, masked", number)
            for t in ("v5e:2x2", "v5e:16x16", "4xh100")
        ),
        *(
            (t, "a ResNet-50 step, GB of traffic per chip", "ResNet-50 step", traffic)
            for t in ("v5e:2x2", "v6e:2x2", "h100")
        ),
        *(
            (t, "a ResNet-50 step's all-reduces, gradients' too", "ResNet-50 step", number)
            for t in ("v5e:2x2", "4xh100")
        ),
    ]
    lines = [f"| forward + backward | {' | '.join(norms)} |", "|---" * (len(norms) + 1) + "|"]
    for target, what, program, value in asked:
        rows = [found[program, target, norm] for norm in norms if (program, target, norm) in found]
        if len(rows) == len(norms):
            lines.append(f"| {target}: {what} | {' | '.join(map(value, rows))} |")
    return "\n".join(lines)


Times = dict[tuple[str, str, str, str], float]  # by shape, dtype, mode and peer


def layers() -> str:
    """How many times as long as bnjax the others take: median over the large shapes, and the range."""
    rows = [row for row in _rows("layers") if np.prod(row["size"]) >= LARGE]
    times: Times = {(r["shape"], r["dtype"], r["mode"], r["peer"]): r["milliseconds"] for r in rows}
    dtypes = ("float32", "bfloat16")
    columns = [(mode, dtype) for mode in ("forward", "forward + backward") for dtype in dtypes]
    columns.append(("forward + backward, masked", "float32"))
    lines = ["| | " + " | ".join(f"{mode}, {dtype}" for mode, dtype in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for peer in PEERS:
        cells = [_times(times, (dtype, mode, peer), (dtype, mode, "bnjax")) for mode, dtype in columns]
        lines.append(f"| {peer} | {' | '.join(cells)} |")
    step = ("forward + backward", "bnjax")
    masked = [_times(times, (dtype, f"{step[0]}, masked", "bnjax"), (dtype, *step)) for dtype in dtypes]
    halved = _times(times, ("bfloat16", *step), ("float32", *step))
    lines += [
        "",
        f"bnjax beside itself: a mask takes {masked[0]} times the time without one in float32, {masked[1]} in",
    ]
    lines.append(f"bfloat16; bfloat16 takes {halved} times the time of float32.")
    return "\n".join(lines)


def _times(times: Times, one: tuple[str, str, str], other: tuple[str, str, str]) -> str:
    """Times of one by those of the other (dtype, mode, peer), over the shapes; empty where one has none."""
    ratios = [times[shape, *one] / times[shape, *other] for shape, *key in times if tuple(key) == one]
    return f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""


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
    return fits.tables(fits.read(RESULTS / "scaling.jsonl"))


Tables = dict[str, Callable[[], str]]
TABLES: Tables = {"accuracy": accuracy, "compiled": compiled, "layers": layers}
PAGES = {
    ROOT / "README.md": TABLES,
    ROOT / "experiments" / "bench" / "README.md": {"scaling": scaling, "paper": paper.table},
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
