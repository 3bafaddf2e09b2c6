"""Measures the time that XLA and JAX take over a training step of ResNet-50, beside flax.linen.

Claim:    On the CPU and for H100 a step with bnjax takes 1.0 to 1.2 times flax.linen's time to trace and lower, and
          1.3 times its time to compile.
Command:  python -m experiments.bench.compiled.compile_time    # --targets v5e:2x2 h100 needs pip install "bnjax[aot]"
Hardware: any; the programs are compiled, not run
Time:     3 min for the CPU on 2 cores; 8 min for H100, 30 min for v5e

Seconds are those of the processor, not of the clock, so that other work on the machine counts little. The norms take
turns, and each figure is the median over the rounds. JAX's caches are emptied before each trace.
"""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import tyro

from experiments.bench import report
from experiments.bench.compiled import aot
from experiments.bench.compiled.targets import TARGETS, require

STAGES = ("trace", "lower", "compile")


@dataclasses.dataclass(frozen=True)
class Config:
    """Options: what is compiled, how often, and where the rows go."""

    targets: tuple[Literal["cpu", *TARGETS], ...] = ("cpu",)
    """Targets to compile for."""
    program: Literal[*aot.PROGRAMS] = "ResNet-50 step"
    """The program."""
    norms: tuple[Literal[*aot.NORMS], ...] = ("bnjax", "flax.linen")
    """Normalizations to compare; the last one is the unit."""
    rounds: int = 3
    """How often each is compiled."""
    skip_compile: bool = False
    """Trace and lower only."""
    out: Path | None = None
    """Folder to write compile_time.jsonl and .md to; by default nothing is written."""


def once(program: str, norm: str, target: str, skip_compile: bool) -> dict[str, float]:
    """Returns the processor's seconds of each stage, and the characters of the StableHLO."""
    jax.clear_caches()
    trace, _ = aot.tracer(program, norm, target)
    times = [time.process_time()]
    traced = trace()
    times.append(time.process_time())
    lowered = traced.lower()
    times.append(time.process_time())
    if not skip_compile:
        lowered.compile()
        times.append(time.process_time())
    took = dict(zip(STAGES, (b - a for a, b in itertools.pairwise(times)), strict=False))
    return took | {"characters": len(lowered.as_text())}


def rows(config: Config) -> Iterator[dict[str, Any]]:
    """Yields a row for each target and norm."""
    for target in config.targets:
        found: dict[str, list[dict[str, float]]] = {norm: [] for norm in config.norms}
        for _ in range(config.rounds):
            for norm in config.norms:
                found[norm].append(once(config.program, norm, target, config.skip_compile))
        unit = _medians(found[config.norms[-1]])
        for norm in config.norms:
            row = _medians(found[norm])
            ratios = {f"{name}_over": row[name] / unit[name] for name in row}
            yield {"program": config.program, "target": target, "norm": norm, "rounds": config.rounds, **row, **ratios}


def _medians(found: list[dict[str, float]]) -> dict[str, float]:
    """Returns the median of each figure."""
    return {name: statistics.median(line[name] for line in found) for name in found[0]}


def show(row: dict[str, Any]) -> str:
    """Formats a row as one line for the terminal."""
    figures = (f"{n} {row[n]:.4g} ({row[n + '_over']:.2f})" for n in (*STAGES, "characters") if n in row)
    return f"{row['target']:9s} {row['norm']:21s} " + "  ".join(figures)


def summary(found: list[dict[str, Any]]) -> str:
    """Returns the page's text."""
    shown = [name for name in (*STAGES, "characters") if name in found[0]]
    head = ("target", "norm", *shown, *(f"{name} ÷" for name in shown))
    lines = [
        (r["target"], r["norm"], *(f"{r[n]:.4g}" for n in shown), *(f"{r[n + '_over']:.2f}" for n in shown))
        for r in found
    ]
    return (
        f"{found[0]['program']} in bfloat16, compiled and not run: processor seconds of each stage, and "
        f"characters of StableHLO; medians of {found[0]['rounds']}. On the right in units of {found[-1]['norm']}.\n\n"
        + report.table(head, lines)
    )


def main(config: Config) -> None:
    """Measures, prints each row, and writes the table where --out says."""
    require(set(config.targets) - {"cpu"})
    found = report.shown(rows(config), show)
    if config.out:
        report.keep(found, config.out, "compiled.compile_time", "Time to compile", summary(found))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
