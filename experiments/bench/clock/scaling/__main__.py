"""How a layer's cost grows: with rows, channels, simulated devices, real processes; and on paper, up to 4,096 chips.

Claim:    Beyond the caches time is in proportion to the elements, whatever the shape; pooling adds two all-reduces.
Command:  python -m experiments.bench.clock.scaling      # --quick takes a minute; --paper prints the model of pods
Hardware: 2 CPU cores, nothing else running, 4 GB of memory
Time:     6 min

Rows go to 10^6 at 64 channels and to 10^7 at 8, where an array has 320 MB and not 2.5 GB; channels from 8 to 4,096 with
the number of elements fixed, so that traffic to memory stays the same and every change is due to the shape. Up to eight
simulated devices divide one batch: two cores do the work in any case, so what can be read is the price of pooling the
statistics and of the division, not a speedup. Processes are real and meet over gloo; more of them than cores wait for
each other. `fits.py` makes tables and picture of the lines, and `paper.py` has the model.
"""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from experiments import jsonl
from experiments.bench import report
from experiments.bench.clock import peers
from experiments.bench.clock.scaling import fits, paper
from experiments.bench.clock.timing import interleaved

MODE = "forward + backward"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes that are measured, and the time spent on them."""

    wide: Sequence[int]  # rows of 64 channels
    narrow: Sequence[int]  # rows of 8
    channels: Sequence[int]
    elements: int  # of the activation in the sweep over channels
    batch: tuple[int, int]  # rows and channels of the batch that is split over the devices
    payloads: Sequence[int]  # channels of the layer in the sweeps over processes
    rounds: int  # of devices and processes
    seconds: float  # for each comparison on one device


THOUSANDS = tuple(int(10 ** (half / 2)) for half in range(6, 15))  # 10^3 to 10^7, two a decade
FULL = Sizes(
    wide=THOUSANDS[:7],
    narrow=THOUSANDS,
    channels=tuple(2**k for k in range(3, 13)),
    elements=2**23,
    batch=(32 * 28 * 28, 128),
    payloads=tuple(2**k for k in range(3, 13)),
    rounds=30,
    seconds=2.0,
)
QUICK = Sizes(
    wide=(1000, 40_000, 100_000),
    narrow=(300_000, 1_000_000),
    channels=(8, 4096),
    elements=2**21,
    batch=(4096, 64),
    payloads=(8, 4096),
    rounds=5,
    seconds=0.5,
)
ROWS_OF_A_PROCESS = 256  # few, so that the time is that of the all-reduce


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the benchmark: what is measured, and where the results go."""

    out: Path | None = None
    """Folder of scaling.jsonl and scaling.png; by default that of the results, and with --quick nowhere."""
    quick: bool = False
    """Measure few and small sizes: a check that everything runs, not a measurement."""
    paper: bool = False
    """Measure nothing; print what BN costs on 256 and 4,096 chips according to the model."""


def measure(sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Yields a row for each size and curve of every sweep."""
    for name, channels, lengths in (("64 channels", 64, sizes.wide), ("8 channels", 8, sizes.narrow)):
        for rows in lengths:
            yield from _compare(name, rows, channels, rows, sizes.seconds)
    for channels in sizes.channels:
        yield from _compare("elements fixed", sizes.elements // channels, channels, channels, sizes.seconds)
    yield from _devices(sizes)
    for processes in (2, 4):
        yield from _processes(sizes, processes)


def _compare(sweep: str, rows: int, channels: int, grows: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Times the layer on one device, with flax.linen's and the floor; they share x and dy, which may be large."""
    x, dy = (jax.random.normal(jax.random.key(seed), (rows, channels)) for seed in range(2))
    runs = {"floor": peers.floor_run(MODE, x, dy, jnp.float32)}
    runs |= {peer: peers.jax_run(peer, MODE, x, dy, jnp.float32) for peer in ("bnjax", "flax.linen")}
    for curve, time in interleaved(runs, rounds=15, seconds=seconds).items():
        size = dict(rows=rows, channels=channels, devices=1, bytes=rows * channels * 4)
        measured = dict(milliseconds=round(time.median * 1e3, 5), spread=round(time.spread, 3))
        yield dict(sweep=sweep, grows=grows, curve=curve, **size, **measured)


def _devices(sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Yields the times over one to eight simulated devices."""
    todo = dict(cases=[sizes.batch], meshes=[1, 2, 4, 8], rounds=sizes.rounds)
    for row in _started([todo]):
        yield dict(sweep="simulated devices", grows=row["devices"]) | row


def _processes(sizes: Sizes, processes: int) -> Iterator[dict[str, Any]]:
    """Yields the times over real processes, each with one device."""
    cases = [(ROWS_OF_A_PROCESS * processes, channels) for channels in sizes.payloads]
    todo = dict(cases=cases, meshes=[processes], rounds=sizes.rounds, processes=processes, address=_free_address())
    for row in _started([dict(todo, index=index) for index in range(processes)]):
        yield dict(sweep=f"{processes} processes", grows=row["channels"] * fits.BYTES_PER_CHANNEL) | row


def _free_address() -> str:
    """Returns an address of this machine with a free port, "127.0.0.1:port"."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{s.getsockname()[1]}"


def _started(todos: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Starts one process per entry of `todos`, and yields the JSON lines of the first; each sets its own
    device count.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    command = [sys.executable, "-m", "experiments.bench.clock.scaling.processes"]
    outputs = [subprocess.PIPE] + [subprocess.DEVNULL] * (len(todos) - 1)
    workers = [
        subprocess.Popen([*command, json.dumps(todo)], cwd=report.ROOT, env=environment, stdout=output, text=True)
        for todo, output in zip(todos, outputs, strict=True)
    ]
    try:
        lines = workers[0].stdout or ()
        yield from (line for text in lines if text.startswith("{") for line in jsonl.parse(text))
        if failed := [worker.args for worker in workers if worker.wait(timeout=60)]:
            raise RuntimeError(f"a process failed, see above: {failed}")
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()  # waits, and closes its pipe


def show(row: dict[str, Any]) -> str:
    """Formats a row as one line for the terminal."""
    size = f"{row['rows']:9,d} x {row['channels']:<5d} on {row['devices']}"
    return f"{row['sweep']:17s} {size}  {row['curve']:11s} {row['milliseconds']:11.4f} ms ± {row['spread']:4.0%}"


def main(config: Config) -> None:
    """Prints the model of pods, or measures and prints; writes lines and picture unless --quick is given."""
    if config.paper:
        print(paper.table())
        return
    about = report.versions() | {"sizes": "quick" if config.quick else "full"}
    lines = [about, *report.shown(measure(QUICK if config.quick else FULL), show)]
    print("\n" + fits.tables(lines))
    if out := config.out or (None if config.quick else report.RESULTS):
        out.mkdir(parents=True, exist_ok=True)
        jsonl.write(out / "scaling.jsonl", lines)
        fits.draw(lines, out / "scaling.png")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
