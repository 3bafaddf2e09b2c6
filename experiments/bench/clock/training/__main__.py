"""A training step of ResNet-20 in every library, on the CPU: time, compile time and memory; and what an import takes.

Claim:    A step with flax.linen takes 1.10 times as long in float32, 1.05 times in bfloat16, and 1.4 times the
          temporary memory; it compiles in three quarters of the time. PyTorch's convolutions make its step 1.9
          to 3.5 times as fast.
Command:  python -m experiments.bench.clock.training     # --quick takes a minute
Hardware: 2 CPU cores, nothing else running
Time:     10 min

Batch 128 of 32×32×3, forward, backward, SGD with momentum and running averages, variables donated; the same parameters
everywhere. All JAX libraries run in one process, in turns; PyTorch in a phase of its own, each of its numbers beside
steps of bnjax timed in that phase. Compilations are fresh: no cache, in memory or on disk, holds any of it.
"""

import dataclasses
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from tqdm import tqdm

from experiments import jsonl
from experiments.bench import report
from experiments.bench.clock import peers
from experiments.bench.clock.timing import Seconds, interleaved
from experiments.bench.clock.training import imports as training_imports
from experiments.bench.clock.training import resnet20
from experiments.bench.clock.training import steps as training_steps
from experiments.bench.compiled.memory import SEQUENTIAL

BATCHES = {"resnet20": (128, 32, 10), "resnet50": (8, 224, 1000)}  # images, their width, classes
QUICK = {"resnet20": (16, 16, 10), "resnet50": (4, 64, 1000)}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
Part = Literal["step", "memory", "imports"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the benchmark: what is measured, and where the results go."""

    out: Path = report.RESULTS
    """Folder of training.jsonl and training.md."""
    quick: bool = False
    """Measure a small batch in few rounds, and write nothing."""
    parts: tuple[Part, ...] = ("step", "memory", "imports")
    """Parts to measure; results are written only if it is all of them."""
    network: Literal["resnet20", "resnet50"] = "resnet20"
    """Network; resnet50 has batch 8 of 224×224×3, in flax.linen only, and is printed but not written."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Dtypes of the activations."""
    rounds: int = 15
    """Largest number of rounds of each comparison."""
    seconds: float = 90.0
    """After the first five rounds, a comparison ends when this time is over."""
    compilations: int = 3
    """Compilations of each step; the median time is reported."""
    compilers: Path = Path(sys.executable)
    """Python interpreter with the compilers for TPU and GPU, `pip install "bnjax[aot]"`; by default this one."""


# The step -------------------------------------------------------------------------------------------------------------


def steps(config: Config) -> Iterator[dict[str, Any]]:
    """Yields a row for each library and dtype; PyTorch's rows come last."""
    has_torch = "torch" not in peers.left_out() and config.network == "resnet20"
    if not has_torch:
        print("torch is not measured: it is not installed, or has no such network here", flush=True)
    runs = {}
    for dtype in config.dtypes:
        runs[dtype] = yield from _jax_steps(config, dtype)
    for dtype in config.dtypes if has_torch else ():
        yield from _torch_steps(config, dtype, *runs[dtype])


def _jax_steps(config: Config, dtype: str) -> Iterator[dict[str, Any]]:
    """Times the step in the JAX libraries and yields their rows; returns batch, parameters and step of bnjax."""
    batch = training_steps.batch_of(*(QUICK if config.quick else BATCHES)[config.network])
    nets = training_steps.jax_nets(config.network, batch.images, DTYPES[dtype])
    executables, lowering, compiling = _compilations(config, nets, batch)
    runs = {name: training_steps.jax_run(net, executables[name], batch) for name, net in nets.items()}
    losses = {name: float(run()) for name, run in runs.items()}
    times = _times(config, runs)
    for name, net in nets.items():
        yield _row(dtype, name, times) | {
            "trace_and_lower_seconds": round(lowering[name], 2),
            "compile_seconds": round(compiling[name], 2),
            "temporary_megabytes": round(executables[name].memory_analysis().temp_size_in_bytes / 1e6, 1),
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(net.params)),
            "first_loss": round(losses[name], 5),
        }
    return batch, nets["bnjax"].params, runs["bnjax"]


def _compilations(config: Config, nets: dict[str, Any], batch: Any) -> tuple[dict[str, Any], ...]:
    """Compiles each network several times, in shuffled order, and discards the first time of each.

    Returns the executables, the median seconds of tracing and lowering, and the median seconds of compiling.
    """
    count = 1 if config.quick else config.compilations
    order, shuffle = list(nets), random.Random(0).shuffle
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in nets}
    executables = {}
    for done in tqdm(range(count + 1), desc="compiling", disable=None):
        shuffle(order)
        for name in order[:1] if not done else order:  # the first compilation imports modules that JAX loads lazily
            executables[name], *seconds = training_steps.compiled(nets[name], batch)
            times[name] += [tuple(seconds)] if done else []
    medians = ({name: statistics.median(t[i] for t in own) for name, own in times.items()} for i in range(2))
    return executables, *medians


def _torch_steps(
    config: Config, dtype: str, batch: Any, params: Any, bnjax_run: Callable[[], Any]
) -> Iterator[dict[str, Any]]:
    """Times the step in PyTorch, interleaved with that of bnjax, and yields its rows."""
    nets = {name: resnet20.torch_resnet20(params) for name in training_steps.TORCH}
    runs = {name: training_steps.torch_run(net, name, batch, DTYPES[dtype]) for name, net in nets.items()}
    losses = {name: run() for name, run in runs.items()}
    memory = {name: training_steps.torch_memory(run) for name, run in runs.items()}
    times = _times(config, {"bnjax": bnjax_run, **runs})
    for name, net in nets.items():
        yield _row(dtype, name, times) | {
            "temporary_megabytes": round(memory[name] / 1e6, 1),
            "parameters": sum(parameter.numel() for parameter in net.parameters()),
            "first_loss": round(losses[name], 5),
        }


def _times(config: Config, runs: dict[str, Callable[[], Any]]) -> dict[str, Seconds]:
    """Times the runs, interleaved, within the limits of the configuration."""
    limits = dict(rounds=5, seconds=5.0) if config.quick else dict(rounds=config.rounds, seconds=config.seconds)
    print(f"timing {', '.join(runs)}", flush=True)
    return interleaved(runs, **limits)


def _row(dtype: str, name: str, times: dict[str, Seconds]) -> dict[str, Any]:
    """Returns the columns that every library has in the table of steps."""
    own, ours = times[name], times["bnjax"]
    return {
        "part": "step",
        "dtype": dtype,
        "peer": name,
        "milliseconds": round(own.median * 1e3, 2),
        "spread": round(own.spread, 3),
        "bnjax_milliseconds": round(ours.median * 1e3, 2),
        "to_bnjax": round(own.median / ours.median, 3),
    }


# Processes of their own -----------------------------------------------------------------------------------------------


def memory(config: Config) -> Iterator[dict[str, Any]]:
    """Yields temporary memory by number of blocks: on the CPU with both schedulers, and for TPU and H100 if they can
    compile.
    """
    runs = [(sys.executable, "cpu", ("float32",), ""), (sys.executable, "cpu", ("float32",), SEQUENTIAL)]
    if not config.quick:
        runs[0] = (sys.executable, "cpu", ("float32", "bfloat16"), "")
        runs += [(str(config.compilers), target, ("bfloat16",), "") for target in ("v5e:2x2", "h100")]
    for python, target, dtypes, flags in runs:
        command = [python, "-m", "experiments.bench.compiled.memory", "--targets", target, "--dtypes", *dtypes]
        environment = {**os.environ, "XLA_FLAGS": flags}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            print(f"not measured: {done.stderr.splitlines()[-1]}")
        yield from jsonl.parse(done.stdout)


def imports(config: Config) -> Iterator[dict[str, Any]]:
    """Measures import times."""
    return training_imports.measure(3 if config.quick else 15)


# Text -----------------------------------------------------------------------------------------------------------------


def show(row: dict[str, Any]) -> str:
    """Formats a row as one line for the terminal."""
    return "  ".join(f"{name} {value}" for name, value in row.items())


_STEP = {  # column: heading
    "peer": "library",
    "milliseconds": "step, ms",
    "spread": "±",
    "to_bnjax": "of bnjax's time",
    "trace_and_lower_seconds": "trace and lower, s",
    "compile_seconds": "compile, s",
    "temporary_megabytes": "temporary memory, MB",
    "parameters": "parameters",
    "first_loss": "first loss",
}
_MEMORY = {
    "target": "target",
    "scheduler": "scheduler",
    "dtype": "dtype",
    "norm": "library",
    "depths": "blocks",
    "activations": "memory with so many",
    "of_one_block_more": "of one block more",
}
_IMPORTS = {"package": "import", "milliseconds": "ms", "spread": "±", "to_flax": "to flax.linen and flax.nnx"}
_HEADINGS = {"step": "A training step", "memory": "Temporary memory, in activations", "imports": "Import time"}
_COLUMNS = {"step": _STEP, "memory": _MEMORY, "imports": _IMPORTS}


def summary(rows: list[dict[str, Any]]) -> str:
    """Makes Markdown: a table for each part, and for the training step one per dtype."""
    text = []
    for part, heading in _HEADINGS.items():
        for dtype in dict.fromkeys(row.get("dtype") if part == "step" else None for row in rows if row["part"] == part):
            here = [row for row in rows if row["part"] == part and (dtype is None or row["dtype"] == dtype)]
            columns = _COLUMNS[part]
            lines = [[_cell(row.get(name)) for name in columns] for row in here]
            text += [f"## {heading}{', ' + dtype if dtype else ''}", "", report.table(columns.values(), lines), ""]
    return "\n".join(text)


def _cell(value: Any) -> str:
    """Formats a value for the Markdown table."""
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return "" if value is None or value != value else f"{value:,}" if isinstance(value, int) else str(value)


def main(config: Config) -> None:
    """Measures the requested parts and prints them; writes rows and page if all parts were measured."""
    jax.config.update("jax_enable_compilation_cache", False)
    measured = {"step": steps, "memory": memory, "imports": imports}
    rows = report.shown((row for part in config.parts for row in measured[part](config)), show)
    print("\n" + summary(rows))
    if not config.quick and config.network == "resnet20" and set(config.parts) == set(measured):
        text = f"{_NOTE}\n\n{summary(rows)}"
        report.keep(rows, config.out, "clock.training", "A whole network on the CPU", text)


_NOTE = """\
ResNet-20, batch 128 of 32×32×3: forward, backward, SGD with momentum, running averages; the same parameters everywhere.
± is half the distance of the quartiles. Temporary memory of the JAX libraries is XLA's count, of PyTorch the peak of
its allocator in one step. For TPU and GPU: compiled, not run."""

if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
