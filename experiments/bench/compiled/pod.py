"""Compiles the whole training step of ResNet-50 for pods: its collectives and memory, by chips and batch statistics.

    python -m experiments.bench.compiled.pod       # needs pip install "bnjax[aot]"; --targets v5e:2x2 for one

The programs are compiled, not run, in minutes each. The step is that of
`python -m experiments.train --recipe resnet50`, with 64 images on each chip.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh

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

STATISTICS = {"of all chips": None, "of groups of 4": 4, "of each chip": 1}
HEAD = ("target", "chips", "statistics", "all-reduces", "in them", "in branches", "state", "temporary", "arguments")


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


def measure(target: str, statistics: str, per_chip: int, training: Training) -> report.Row:
    """Compiles one step, and returns a row of the table."""
    devices, group = np.array(devices_of(target)), STATISTICS[statistics]
    mesh = Mesh(devices.reshape(-1, group), (GROUPS, DATA)) if group else Mesh(devices.ravel(), (DATA,))
    training = dataclasses.replace(training, batch_size=per_chip * devices.size, bn_group=group)
    step, state, batch = step_of(training, mesh)
    compiled = step.lower(state, batch).compile()
    main, rare = hlo.all_reduces(compiled)
    memory = compiled.memory_analysis()
    return {
        "target": target,
        "chips": devices.size,
        "statistics": statistics,
        "all_reduces": len(main),
        "all_reduced_bytes": sum(map(hlo.size, main)),
        "in_branches": sum(map(len, rare.values())),
        "state_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
    }


def shown(row: report.Row) -> Sequence[str]:
    """Returns the cells of a row: bytes as MB of 10⁶."""
    return [f"{value / 1e6:.0f} MB" if name.endswith("_bytes") else str(value) for name, value in row.items()]


@dataclasses.dataclass(frozen=True)
class Config:
    """Options: what is compiled."""

    targets: tuple[str, ...] = ("v5e:2x2", "v5e:4x4", "v5e:16x16", "4xh100")
    """Chips to compile for."""
    per_chip: int = 64
    """Images on each chip."""
    recipe: str = "resnet50"
    """Recipe of experiments.train."""
    out: Path = report.RESULTS
    """Folder of pod.jsonl and pod.md."""


def main(config: Config) -> None:
    """Prints a row for each target and kind of statistics, and writes all of them."""
    require(config.targets)
    training = defaults(["--recipe", config.recipe]).training
    rows = []
    for target in config.targets:
        for statistics in STATISTICS:
            rows.append(measure(target, statistics, config.per_chip, training))
            print(*shown(rows[-1]), sep=" | ", flush=True)
    text = f"{config.per_chip} images on each chip.\n\n" + report.table(HEAD, map(shown, rows))
    report.keep(rows, config.out, "compiled.pod", "ResNet-50's training step on pods, compiled and not run", text)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
