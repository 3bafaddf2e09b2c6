"""Compiles the whole training step of ResNet-50 for pods: its collectives, memory and work, by chips and statistics.

Command:  python -m experiments.bench.compiled.pod       # pip install "bnjax[aot]"; --targets 4xh100 for one
Hardware: any; the programs are compiled, not run
Time:     1 CPU minute for each row of H100, 4 to 6 for each of v5e

The step is that of `python -m experiments.train --recipe resnet50`, with 64 images on each chip.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh

from experiments import jsonl
from experiments.bench import report
from experiments.bench.compiled import hlo
from experiments.bench.compiled.targets import devices_of, require
from experiments.train.config import Training
from experiments.train.devices import DATA, GROUPS, replicated, split
from experiments.train.loop import TrainStep, initial_state, make_train_step
from experiments.train.nonfinite import skip_nonfinite
from experiments.train.optimizer import OPTIMIZERS
from experiments.train.recipes import defaults
from experiments.train.session import build_model

STATISTICS = {"all chips": None, "groups of 16": 16, "each chip": 1}  # --bn-group
HEAD = (
    "target",
    "chips",
    "statistics of",
    "all-reduces",
    "MB in them",
    "and in branches",
    "state, MB",
    "temporary, GB",
    "traffic, GB",
    "work, TFLOP",
    "to compile, s",
)


def step_of(training: Training, mesh: Mesh, classes: int = 1000) -> tuple[TrainStep, Any, Any]:
    """Returns the training step of a recipe on a mesh, and the shapes of its state and of a batch."""
    model = build_model(training, "shard_map", classes)
    optimizer = skip_nonfinite(OPTIMIZERS[training.optimizer](training.lr, training.weight_decay))
    options = dict(label_smoothing=training.label_smoothing, ema=training.ema)
    step = make_train_step(model, optimizer, mesh, "shard_map", lambda state, stats: {}, **options)
    shape = (training.image_size, training.image_size, 3)

    def initial() -> Any:
        return initial_state(model, optimizer, 0, example=(jnp.zeros((1, *shape)),), average=training.ema > 0)

    def placed(tree: Any, sharding: Any) -> Any:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)

    count = training.batch_size
    batch = {
        "image": np.empty((count, *shape), np.uint8),
        "label": np.empty(count, np.int32),
        "weight": np.empty(count, np.float32),
    }
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), batch)
    return step, placed(jax.eval_shape(initial), replicated(mesh)), placed(shapes, split(mesh))


def lowered(training: Training, target: str, group: int | None, per_chip: int) -> tuple[Any, Any]:
    """Lowers the step for all chips of a target; returns it, and the shapes of its state."""
    devices = np.array(devices_of(target))
    mesh = Mesh(devices.reshape(-1, group), (GROUPS, DATA)) if group else Mesh(devices.ravel(), (DATA,))
    step, state, batch = step_of(
        dataclasses.replace(training, batch_size=per_chip * devices.size, bn_group=group), mesh
    )
    return step.lower(state, batch), state


def measure(target: str, statistics: str, per_chip: int, training: Training, flops: float) -> report.Row:
    """Compiles one step, and returns its row: everything but the count of chips is that of one chip."""
    before, state = lowered(training, target, STATISTICS[statistics], per_chip)
    began = time.process_time()
    compiled = before.compile()
    seconds, text = time.process_time() - began, compiled.as_text()
    main, rare = hlo.all_reduces(text)
    return {
        "target": target,
        "chips": len(devices_of(target)),
        "statistics": statistics,
        "images": per_chip,
        "all_reduces": len(main),
        "all_reduced_bytes": sum(map(hlo.payload, main)),
        "in_branches": sum(map(len, rare.values())),
        "state_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "traffic_bytes": hlo.traffic(text)[0],
        "flops": flops,
        "compile_seconds": round(seconds),
        "ran": "compiled, not run",
    }


def kinds(target: str, asked: Sequence[str]) -> list[str]:
    """Returns the kinds of statistics that differ on so many chips."""
    chips = len(devices_of(target))
    return [name for name in asked if STATISTICS[name] is None or STATISTICS[name] < chips]


def cells(row: report.Row) -> Sequence[Any]:
    """Returns the cells of a row of the table."""
    return (
        *(row[name] for name in ("target", "chips", "statistics", "all_reduces")),
        f"{row['all_reduced_bytes'] / 1e6:.1f}",
        row["in_branches"],
        f"{row['state_bytes'] / 1e6:.0f}",
        f"{row['temporary_bytes'] / 1e9:.2f}",
        f"{row['traffic_bytes'] / 1e9:.1f}",
        f"{row['flops'] / 1e12:.2f}",
        row["compile_seconds"],
    )


def keep(row: report.Row, out: Path) -> None:
    """Adds a row to the results in the place of an older one, and writes the page anew."""
    file, key = out / "pod.jsonl", lambda row: (row["chips"], row["target"], list(STATISTICS).index(row["statistics"]))
    old = jsonl.read(file)[1:] if file.exists() else []
    rows = sorted({key(row): row for row in (*old, row)}.values(), key=key)
    text = (
        f"{row['images']} images on each chip. Everything but the count of chips is that of one chip. The branches are "
        "the guards of BN, which a steady state does not run. Traffic is what the program reads and writes in main "
        "memory, work what XLA counts before it optimises, and the time that of the processor.\n\n"
    )
    heading = "ResNet-50's training step on pods, compiled and not run"
    report.keep(rows, out, "compiled.pod", heading, text + report.table(HEAD, map(cells, rows)))


@dataclasses.dataclass(frozen=True)
class Config:
    """Options: what is compiled."""

    targets: tuple[str, ...] = ("4xh100", "16xh100", "256xh100", "v5e:2x2", "v5e:4x4", "v5e:16x16")
    """Chips to compile for."""
    statistics: tuple[Literal[*STATISTICS], ...] = tuple(STATISTICS)
    """Which chips share the statistics of a batch; kinds that differ from no other on so many chips are left out."""
    per_chip: int = 64
    """Images on each chip."""
    recipe: str = "resnet50"
    """Recipe of experiments.train, or a file .toml."""
    out: Path = report.RESULTS
    """Folder of pod.jsonl and pod.md; a new row replaces an older one of the same chips and statistics."""


def main(config: Config) -> None:
    """Compiles for each target with each kind of statistics, and writes each row as soon as it is known."""
    require(config.targets)
    training = defaults(["--recipe", config.recipe]).training
    flops = lowered(training, "cpu", None, config.per_chip)[0].cost_analysis()["flops"]
    for target in config.targets:
        for statistics in kinds(target, config.statistics):
            row = measure(target, statistics, config.per_chip, training, flops)
            print(*cells(row), sep=" | ", flush=True)
            keep(row, config.out)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
