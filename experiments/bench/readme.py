"""Writes the tables of accuracy and speed in README.md and experiments/bench/README.md from the committed results.

Command:  python -m experiments.bench.readme             # writes them; --check tells if they are up to date
"""

import sys
from collections.abc import Callable

import numpy as np
import tyro

from experiments import jsonl
from experiments.bench import report
from experiments.bench.clock.scaling import fits, paper
from experiments.bench.report import RESULTS, ROOT

PEERS = ("flax.linen", "flax.linen, accurate", "flax.nnx", "haiku", "keras", "torch", "torch, channels last")
LARGE = 2_000_000  # elements: 8 MB in float32


def compiled() -> str:
    """Makes a table of traffic and collectives per target, of a layer and of a training step of ResNet-50."""
    norms = ("bnjax", "flax.linen", "flax.linen, accurate")
    found = {(row["program"], row["target"], row["norm"]): row for row in jsonl.read(RESULTS / "aot.jsonl")}

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
    lines = []
    for target, what, program, value in asked:
        rows = [found[program, target, norm] for norm in norms if (program, target, norm) in found]
        if len(rows) == len(norms):
            lines.append((f"{target}: {what}", *map(value, rows)))
    return report.table(("forward + backward", *norms), lines)


Times = dict[tuple[str, str, str, str], float]  # by shape, dtype, mode and peer


def layers() -> str:
    """Makes a table of the other libraries' times in multiples of bnjax's: median over large shapes, and range."""
    rows = [row for row in report.read("layers") if np.prod(row["size"]) >= LARGE]
    times: Times = {(r["shape"], r["dtype"], r["mode"], r["peer"]): r["milliseconds"] for r in rows}
    dtypes = ("float32", "bfloat16")
    columns = [(mode, dtype) for mode in ("forward", "forward + backward") for dtype in dtypes]
    columns.append(("forward + backward, masked", "float32"))
    lines = [
        (peer, *(_times(times, (dtype, mode, peer), (dtype, mode, "bnjax")) for mode, dtype in columns))
        for peer in PEERS
    ]
    step = ("forward + backward", "bnjax")
    masked = [_times(times, (dtype, f"{step[0]}, masked", "bnjax"), (dtype, *step)) for dtype in dtypes]
    halved = _times(times, ("bfloat16", *step), ("float32", *step))
    return (
        report.table(("library", *(f"{mode}, {dtype}" for mode, dtype in columns)), lines)
        + f"\n\nbnjax beside itself: a mask takes {masked[0]} times the time without one in float32, {masked[1]} in"
        + f"\nbfloat16; bfloat16 takes {halved} times the time of float32."
    )


def _times(times: Times, one: tuple[str, str, str], other: tuple[str, str, str]) -> str:
    """Formats the median and range over shapes of one (dtype, mode, peer)'s time divided by another's; empty if not
    measured.
    """
    ratios = [times[shape, *one] / times[shape, *other] for shape, *key in times if tuple(key) == one]
    return f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""


def accuracy() -> str:
    """Makes a table of errors of y in the first step in float32, by mean/std of the data."""
    norms = ("bnjax", "flax.linen", "flax.linen, accurate", "torch")
    rows = [row for row in report.read("accuracy") if (row["dtype"], row["step"]) == ("float32", "first")]
    found = {(row["peer"], row["ratio"]): row["y"] for row in rows}
    ratios = (0, 1e2, 1e3, 1e4, 1e5)
    lines = [(f"{ratio:g}", *(f"{found[norm, ratio]:.1e}" for norm in norms)) for ratio in ratios]
    return report.table(("mean/std", *norms), lines)


def scaling() -> str:
    """Makes the tables of how a layer's time grows, and of what pooling the statistics costs."""
    return fits.tables(jsonl.read(RESULTS / "scaling.jsonl"))


Tables = dict[str, Callable[[], str]]
TABLES: Tables = {"accuracy": accuracy, "compiled": compiled, "layers": layers}
PAGES = {
    ROOT / "README.md": TABLES,
    ROOT / "experiments" / "bench" / "README.md": {"scaling": scaling, "paper": paper.table},
}


def updated(text: str, tables: Tables = TABLES) -> str:
    """Returns `text` with each table between its markers made anew."""
    for name, table in tables.items():
        begin, end = f"<!-- bench:{name} -->\n", "\n<!-- end -->"
        before, found, rest = text.partition(begin)
        if not found or end not in rest:
            raise ValueError(f"README.md must have a place for the table {name}: {begin!r} ... {end!r}")
        text = before + begin + table() + end + rest.partition(end)[2]
    return text


def main(check: bool = False) -> None:
    """Writes the tables of both pages.

    Args:
        check: write nothing, and exit with status 1 if a page is out of date.
    """
    for file, tables in PAGES.items():
        text = file.read_text()
        if check and updated(text, tables) != text:
            sys.exit(f"{file.relative_to(ROOT)} is out of date: run python -m experiments.bench.readme")
        if not check:
            file.write_text(updated(text, tables))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
