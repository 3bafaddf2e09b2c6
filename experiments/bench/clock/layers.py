"""One layer on the CPU, by the clock: every library's batch normalization beside a floor of plain passes over memory.

Claim:    Training at 8 MB and more, the inexact layers of other JAX libraries take 1.4 times as long in float32 and
          3 to 12 times in bfloat16 (medians); padded batches take 1.2 times as long as whole ones.
Command:  python -m experiments.bench.clock.layers       # --quick takes less than a minute
Hardware: 2 CPU cores, nothing else running
Time:     9 min

Shapes of ResNet-50 at batch 32, of MobileNet, of a Transformer's rows, and small ones. All JAX libraries and the floor
run in one process, in turns; PyTorch in a phase of its own, each of its numbers beside a floor timed in that phase.
"""

import dataclasses
import json
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tyro

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
}
QUICK = ("ResNet-50, stage 1", "MLP rows")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured, and where it goes."""

    out: Path = Path(__file__).parents[1] / "results"
    """Folder of layers.jsonl, layers.md and layers.png."""
    quick: bool = False
    """Two shapes in float32, training and evaluation; nothing is written."""
    rounds: int = 15
    """Rounds of each comparison, at most."""
    seconds: float = 3.0
    """After the first five rounds a comparison ends with this."""
    shapes: tuple[str, ...] = ()
    """Only these."""


def measure(config: Config) -> Iterator[dict[str, Any]]:
    """A row for each library, shape, dtype and mode; those of PyTorch at the end."""
    names = config.shapes or (QUICK if config.quick else tuple(SHAPES))
    dtypes = ("float32",) if config.quick else tuple(DTYPES)
    cases = [(n, d, m) for n in names for d in dtypes for m in (peers.MODES[1::2] if config.quick else peers.MODES)]
    absent = set(peers.left_out())
    for name in sorted(absent):
        print(f"{name} is not installed: left out")
    present = [name for name in peers.JAX_PEERS if name not in absent]
    for case in cases:
        yield from _compare(config, case, dict.fromkeys(_able(present, case), peers.jax_run))
    if "torch" not in absent:
        for case in cases:
            yield from _compare(config, case, dict.fromkeys(_able(peers.TORCH_PEERS, case), peers.torch_run))


def _able(names: Sequence[str], case: tuple[str, str, str]) -> list[str]:
    """Those whose layer takes a mask, where there is one."""
    return [name for name in names if "masked" not in case[2] or name not in peers.WITHOUT_MASK]


def _compare(config: Config, case: tuple[str, str, str], makers: dict[str, Any]) -> Iterator[dict[str, Any]]:
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
    """Markdown: a table for each mode and dtype, in times of the floor; at its end bnjax in times of the best other."""
    names = list(dict.fromkeys(row["peer"] for row in rows))
    text = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        for mode in dict.fromkeys(row["mode"] for row in rows):
            here = [row for row in rows if (row["dtype"], row["mode"]) == (dtype, mode)]
            text += [f"## {mode}, {dtype}", "", f"| shape | MB | floor, ms | {' | '.join(names)} | bnjax to best |"]
            text.append("|---" * (len(names) + 4) + "|")
            text += [_line(here, shape, names) for shape in dict.fromkeys(row["shape"] for row in here)]
            text.append("")
    return "\n".join(text)


def _line(rows: list[dict[str, Any]], shape: str, names: list[str]) -> str:
    found = {row["peer"]: row for row in rows if row["shape"] == shape}
    first = next(iter(found.values()))
    megabytes = np.prod(first["size"]) * DTYPES[first["dtype"]](0).nbytes / 1e6
    cells = [f"{found[name]['over_floor']:.2f}" if name in found else "" for name in names]
    others = [row["over_floor"] for name, row in found.items() if name != "bnjax"]
    best = found["bnjax"]["over_floor"] / min(others) if others and "bnjax" in found else float("nan")
    head = f"{shape} {tuple(first['size'])} | {megabytes:.1f} | {first['floor_milliseconds']:.2f}"
    return f"| {head} | {' | '.join(cells)} | {best:.2f} |"


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Training in float32 and bfloat16: times of the floor by the size of the activation."""
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


def versions() -> dict[str, str]:
    """Of what was measured, and the machine."""
    packages = ("bnjax", "jax", "flax", "dm-haiku", "equinox", "keras", "torch")
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found | {"python": platform.python_version(), "machine": platform.machine(), "cores": str(os.cpu_count())}


def shown(rows: Iterable[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    """All rows, each printed as it comes: what these keys say, its time and how it compares."""
    kept = []
    for row in rows:
        what = " ".join(f"{row[name]!s:26s}" for name in names)
        time = f"{row['milliseconds']:9.3f} ms ± {row['spread']:4.0%}  {row['over_floor']:6.2f} of the floor"
        print(f"{what} {time}", flush=True)
        kept.append(row)
    return kept


def keep(rows: list[dict[str, Any]], out: Path, name: str, heading: str, text: str) -> None:
    """Writes the rows as JSON lines behind the versions, and a page with the same versions."""
    out.mkdir(parents=True, exist_ok=True)
    about = versions()
    made = ", ".join(f"{package} {version}" for package, version in about.items())
    (out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [about, *rows]))
    (out / f"{name}.md").write_text(f"# {heading}\n\nMade by `python -m experiments.bench.{name}` with {made}. {text}")


def main(config: Config) -> None:
    rows = shown(measure(config), "mode", "dtype", "shape", "peer")
    print("\n" + summary(rows))
    if config.quick or config.shapes:
        return
    keep(rows, config.out, "layers", "One layer on the CPU", f"Times of the floor.\n\n{summary(rows)}")
    draw(rows, config.out / "layers.png")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
