"""Measures a real accelerator: accuracy on the device, times beside Flax, bandwidth, all-reduces, memory, compile time.

Claim:    On TPU and GPU a layer takes no longer than with flax.linen or flax.nnx, and is as exact as on the CPU.
Command:  python -m experiments.bench.accelerator           # --smoke: a minute on any CPU, to see that all of it runs
Hardware: the devices that JAX finds, one or several of one process
Time:     5 min on one GPU

This is the first thing to run on a TPU or GPU that nobody here has seen. It prints one table, draws one picture, and
writes JSON lines with versions and device to send in. Times are those of the device's own clock where its profiler has
one (`clock.py`); bytes are those that the compiled program moves (`experiments/bench/compiled/hlo.py`), without the
branches that it does not usually run.
"""

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import tyro
from tqdm import tqdm

from experiments import jsonl
from experiments.bench import report
from experiments.bench.accelerator import conformance, pages, programs
from experiments.bench.accelerator.clock import timed
from experiments.bench.compiled import hlo

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of everything that is measured; batches are those of one device."""

    conformance: tuple[int, ...] = (64, 14, 14, 8)
    layer: tuple[int, ...] = (256, 56, 56, 64)
    small_layer: tuple[int, ...] = (32, 7, 7, 512)
    batch: int = 128
    images: int = 224
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    calls: int = 20


SMOKE = Sizes((16, 4, 4, 8), (8, 8, 8, 16), (4, 2, 2, 16), batch=2, images=32, blocks=(1, 1), calls=2)


@dataclasses.dataclass(frozen=True)
class Config:
    """Options: sizes, and where the results go."""

    out: Path = Path("accelerator")
    """Folder for accelerator.jsonl, accelerator.md and accelerator.png."""
    smoke: bool = False
    """Use tiny sizes, to see that everything runs; the times mean nothing."""
    batch: int | None = None
    """Images per device in the ResNet-50 step; by default 128."""
    only_conformance: bool = False
    """Compare with float64 and measure nothing else."""

    @property
    def sizes(self) -> Sizes:
        """Returns the sizes with the batch that was asked for."""
        sizes = SMOKE if self.smoke else Sizes()
        return dataclasses.replace(sizes, batch=self.batch) if self.batch else sizes


def spread(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of the whole batch: that of one device times the number of devices."""
    return (shape[0] * jax.device_count(), *shape[1:])


def measured(part: str, name: str, program: programs.Program, sizes: Sizes) -> dict[str, Any]:
    """Compiles and times one program, and returns its row."""
    begin = time.perf_counter()
    executable = program.compile()
    seconds = time.perf_counter() - begin
    run = program.runner(executable)
    for _ in range(3):
        jax.block_until_ready(run())
    took = timed(run, sizes.calls)
    moved, _ = hlo.traffic(executable.as_text())
    peak = pages.peak_bandwidth(jax.devices()[0].device_kind)
    memory = executable.memory_analysis()
    return {
        "part": part,
        "norm": name,
        "milliseconds": took.seconds * 1e3,
        "clock": took.clock,
        "gigabytes": moved / 1e9,
        "gigabytes_per_second": moved / took.seconds / 1e9,
        "of_peak": moved / took.seconds / peak if peak else None,
        "temporary_megabytes": memory.temp_size_in_bytes / 1e6 if memory else None,
        "compile_seconds": seconds,
    }


def timings(sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Yields a row for each program and library."""
    for part, shape in (("layer", sizes.layer), ("small layer", sizes.small_layer)):
        for name in programs.NAMES:
            yield measured(part, name, programs.layer(name, spread(shape)), sizes)
    for name in programs.NAMES:
        program = programs.resnet(name, sizes.batch * jax.device_count(), sizes.images, sizes.blocks)
        yield measured("ResNet-50 step", name, program, sizes)
    if jax.device_count() > 1:
        for axis_name, name in (("data", "statistics of all devices"), (None, "of each device")):
            yield measured("pooling", name, programs.pooled(axis_name, spread(sizes.small_layer)), sizes)


def deterministic(config: Config) -> list[dict[str, Any]]:
    """Repeats the comparison with float64 in a process whose GPU operations are deterministic; empty elsewhere."""
    if jax.default_backend() != "gpu" or config.only_conformance:
        return []
    flags = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}".strip()
    environment = os.environ | {"XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    folder = config.out / "deterministic"
    command = [sys.executable, "-m", "experiments.bench.accelerator", "--only-conformance", "--out", str(folder)]
    subprocess.run(command + ["--smoke"] * config.smoke, env=environment, check=True)
    return [row | {"flags": DETERMINISTIC} for row in jsonl.read(folder / "accelerator.jsonl")[1:]]


def main(config: Config) -> None:
    """Measures everything, and keeps each row as soon as it is known."""
    device = jax.devices()[0]
    about = report.versions() | {"device": device.device_kind, "devices": str(jax.device_count())}
    print(f"{about['devices']} × {about['device']} ({device.platform}), jax {about['jax']}", flush=True)
    config.out.mkdir(parents=True, exist_ok=True)
    found = deterministic(config)  # first, while this process holds little of the device's memory
    sources = [conformance.rows(spread(config.sizes.conformance))]
    sources += [] if config.only_conformance else [timings(config.sizes)]
    with tqdm(desc="accelerator", unit=" rows", disable=None) as bar:
        for rows in sources:
            for row in rows:
                found.append(row)
                bar.set_postfix_str(f"{row['part']}, {row['norm']}")
                bar.update()
                jsonl.write(config.out / "accelerator.jsonl", [about, *found])
    pages.write(about, found, config.out)
    print(pages.text(about, found))
    print(f"\nPlease send in {config.out / 'accelerator.jsonl'}.")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
