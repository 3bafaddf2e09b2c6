"""Times one layer on the CPU: every library's batch normalization, and a floor of plain passes over memory.

Claim:    Training at 8 MB and more, the inexact layers of other JAX libraries take 1.4 times as long in float32 and
          1.1 to 3.7 times in bfloat16 (medians by library); with a mask all take about the same time.
Command:  python -m experiments.bench.clock.layers       # --quick takes less than a minute
Hardware: 2 CPU cores, nothing else running
Time:     9 min

The shapes are those of ResNet-50 at batch 32, of MobileNet, of a Transformer's rows, and small ones. All JAX libraries
and the floor run in one process, interleaved; PyTorch runs in a separate phase, and each of its times is divided by a
floor measured in that phase.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tyro

from experiments.bench import report
from experiments.bench.clock import peers
from experiments.bench.clock.timing import Seconds, interleaved

SHAPES = {
    "ResNet-50, stem": (32, 112, 112, 64),
    "ResNet-50, stage 1": (32, 56, 56, 64),
    "ResNet-50, stage 1 out": (32, 56, 56, 256),
    "ResNet-50, stage 2": (32, 28, 28, 128),
    "ResNet-50, stage 3": (32, 14, 14, 256),
    "ResNet-50, stage 4 out": (32, 7, 7, 2048),
    "MobileNet, first": (32, 112, 112, 32),
    "MobileNet, middle": (32, 14, 14, 96),
    "Transformer rows": (8192, 1024),
    "MLP rows": (4096, 512),
    "small image": (32, 8, 8, 16),
    "small rows": (128, 64),
    "rows of a small MLP": (32, 64),
}
QUICK = ("ResNet-50, stage 1", "MLP rows")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the benchmark: what is measured, and where the results go."""

    out: Path = report.RESULTS
    """Folder of layers.jsonl, layers.md and layers.png."""
    quick: bool = False
    """Measure two shapes in float32, in training and evaluation, and write nothing."""
    rounds: int = 15
    """Largest number of rounds of each comparison."""
    seconds: float = 3.0
    """After the first five rounds, a comparison ends when this time is over."""
    shapes: tuple[str, ...] = ()
    """Measure only these shapes, and write nothing."""


def measure(config: Config) -> Iterator[dict[str, Any]]:
    """Yields a row for each library, shape, dtype and mode; PyTorch's rows come last."""
    names = config.shapes or (QUICK if config.quick else tuple(SHAPES))
    dtypes = ("float32",) if config.quick else tuple(DTYPES)
    cases = [(n, d, m) for n in names for d in dtypes for m in (peers.MODES[1::2] if config.quick else peers.MODES)]
    absent = set(peers.left_out())
    for name in sorted(absent):
        print(f"{name} is not installed: it is not measured")
    present = [name for name in peers.JAX_PEERS if name not in absent]
    for case in cases:
        yield from _compare(config, case, dict.fromkeys(_able(present, case), peers.jax_run))
    if "torch" not in absent:
        for case in cases:
            yield from _compare(config, case, dict.fromkeys(_able(peers.TORCH_PEERS, case), peers.torch_run))


def _able(names: Sequence[str], case: tuple[str, str, str]) -> list[str]:
    """Returns the libraries that can run a case: with a mask, only those whose layer takes one."""
    return [name for name in names if "masked" not in case[2] or name not in peers.WITHOUT_MASK]


def _compare(config: Config, case: tuple[str, str, str], makers: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Times one case in the given libraries, interleaved with the floor, and yields their rows."""
    if not makers:
        return
    name, dtype, mode = case
    shape, rng = SHAPES[name], np.random.default_rng(0)
    x, dy = (rng.standard_normal(shape, np.float32) for _ in range(2))
    runs = {"floor": peers.floor_run(mode, x, dy, DTYPES[dtype])}
    runs |= {peer: make(peer, mode, x, dy, DTYPES[dtype]) for peer, make in makers.items()}
    times = interleaved(runs, rounds=config.rounds, seconds=2.0 if config.quick else config.seconds)
    for peer, seconds in times.items():
        if peer != "floor":
            yield _row(case, shape, peer, seconds, times["floor"])


def _row(
    case: tuple[str, str, str], shape: Sequence[int], peer: str, seconds: Seconds, floor: Seconds
) -> dict[str, Any]:
    """Returns the row of one library's time."""
    name, dtype, mode = case
    return {
        "shape": name,
        "size": list(shape),
        "mode": mode,
        "dtype": dtype,
        "peer": peer,
        "milliseconds": round(seconds.median * 1e3, 4),
        "spread": round(seconds.spread, 3),
        "floor_milliseconds": round(floor.median * 1e3, 4),
        "over_floor": round(seconds.median / floor.median, 3),
    }


def summary(rows: list[dict[str, Any]]) -> str:
    """Makes Markdown tables for each mode and dtype, in multiples of the floor; the last column is bnjax over the best
    other.
    """
    names = list(dict.fromkeys(row["peer"] for row in rows))
    text = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        for mode in dict.fromkeys(row["mode"] for row in rows):
            here = [row for row in rows if (row["dtype"], row["mode"]) == (dtype, mode)]
            shapes = dict.fromkeys(row["shape"] for row in here)
            head = ("shape", "MB", "floor, ms", *names, "bnjax to best")
            text += [f"## {mode}, {dtype}", "", report.table(head, [_cells(here, s, names) for s in shapes]), ""]
    return "\n".join(text)


def _cells(rows: list[dict[str, Any]], shape: str, names: list[str]) -> list[str]:
    """Returns the cells of one shape's line in the table."""
    found = {row["peer"]: row for row in rows if row["shape"] == shape}
    first = next(iter(found.values()))
    megabytes = np.prod(first["size"]) * DTYPES[first["dtype"]](0).nbytes / 1e6
    cells = [f"{found[name]['over_floor']:.2f}" if name in found else "" for name in names]
    others = [row["over_floor"] for name, row in found.items() if name != "bnjax"]
    best = found["bnjax"]["over_floor"] / min(others) if others and "bnjax" in found else float("nan")
    head = (f"{shape} {tuple(first['size'])}", f"{megabytes:.1f}", f"{first['floor_milliseconds']:.2f}")
    return [*head, *cells, f"{best:.2f}"]


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Draws the time of a training step in float32 and bfloat16, in multiples of the floor, by size of the
    activation.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, dtype in zip(figure.subplots(1, 2), DTYPES, strict=True):
        here = [row for row in rows if row["dtype"] == dtype and row["mode"] == "forward + backward"]
        for peer in dict.fromkeys(row["peer"] for row in here):
            own = sorted((np.prod(row["size"]) * 4 / 1e6, row["over_floor"]) for row in here if row["peer"] == peer)
            style = dict(lw=2.5, zorder=3) if peer == "bnjax" else dict(lw=1, alpha=0.8)
            axes.plot(*zip(*own, strict=True), "o-", ms=4, label=peer, **style)
        axes.axhline(1, color="black", lw=0.8, ls=":")
        axes.set(xscale="log", yscale="log", xlabel="activation, millions of bytes in float32", title=dtype)
        axes.set_ylabel("forward + backward, times of the floor")
    axes.legend(fontsize="x-small", ncols=2)
    figure.savefig(file, dpi=120)


def main(config: Config) -> None:
    """Measures and prints; writes rows, page and picture if everything was measured."""
    rows = report.shown(measure(config), lambda row: report.timed(row, "mode", "dtype", "shape", "peer"))
    print("\n" + summary(rows))
    if config.quick or config.shapes:
        return
    text = f"Times of the floor.\n\n{summary(rows)}"
    report.keep(rows, config.out, "clock.layers", "One layer on the CPU", text)
    draw(rows, config.out / "layers.png")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
