"""Compiles BN networks for TPU and GPU, and reports bytes, temporary memory and all-reduces, beside flax.linen.

Claim:    A layer with ReLU moves 7 activations on TPU v5e and H100, flax.linen 7 and 10, its accurate mode 9 and 12.
Command:  python -m experiments.bench.compiled.aot       # pip install "bnjax[aot]"; --quick takes 15 s
Hardware: any; the programs are compiled, not run
Time:     25 min on 2 CPU cores, most of it ResNet-50

Everything is data-parallel under plain jit, in bfloat16. Traffic is what the optimised program reads and writes in main
memory, per chip and in units of the input's size (of ResNet-50: in gigabytes); the branches that a steady state does
not run, the guard of `bnjax.batch_moments`, stand apart. Arrays are too large to stay on chip, but for ResNet-50's last
stages.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax
from experiments import jsonl
from experiments.bench import report
from experiments.bench.compiled import hlo, networks
from experiments.bench.compiled.targets import TARGETS, devices_of, require

RESULTS = report.RESULTS / "aot.jsonl"
TRAIN = dict(use_running_average=False, dtype=jnp.bfloat16)
NORMS = {
    "bnjax": partial(bnjax.BatchNorm, **TRAIN),
    "flax.linen": partial(nn.BatchNorm, **TRAIN),
    "flax.linen, accurate": partial(nn.BatchNorm, **TRAIN, use_fast_variance=False),
}
PROGRAMS = {  # network, shape of a chip's input, targets
    "layer": (networks.Layer, (512, 56, 56, 128), ("v5e:2x2", "v5e:16x16", "v6e:2x2", "h100", "4xh100")),
    "layer, masked": (networks.MaskedLayer, (512, 56, 56, 128), ("v5e:2x2", "v5e:16x16", "v6e:2x2", "h100", "4xh100")),
    # v6e comes last, because there libtpu 0.0.42 crashes the process when it compiles flax.linen's step.
    "ResNet-50 step": (networks.ResNet50, (256, 224, 224, 3), ("v5e:2x2", "h100", "4xh100", "v6e:2x2")),
}
QUICK = (("layer", "v5e:2x2"), ("layer, masked", "v5e:16x16"), ("layer", "h100"), ("layer, masked", "4xh100"))

Step = Callable[..., Any]


def gradient(model: nn.Module) -> Step:
    """Returns a step that computes y, its derivatives in all parameters and x, and the running averages."""

    def step(variables: Any, x: jax.Array, dy: jax.Array) -> Any:
        def forward(params: Any, x: jax.Array) -> Any:
            return model.apply({**variables, "params": params}, x, mutable=["batch_stats"])

        y, pullback, updates = jax.vjp(forward, variables["params"], x, has_aux=True)
        return y, pullback(dy), updates

    return step


def training(model: nn.Module, optimizer: optax.GradientTransformation) -> Step:
    """Returns a training step `(variables, momentum, x, labels) -> (variables, momentum)`."""

    def step(variables: Any, momentum: Any, x: jax.Array, labels: jax.Array) -> Any:
        def loss(params: Any) -> Any:
            logits, updates = model.apply({**variables, "params": params}, x, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updates

        grads, updates = jax.grad(loss, has_aux=True)(variables["params"])
        changes, momentum = optimizer.update(grads, momentum)
        return {"params": optax.apply_updates(variables["params"], changes), **updates}, momentum

    return step


def compiled(program: str, norm: str, target: str) -> tuple[Any, int]:
    """Compiles one program for a target; returns it, and the bytes of one chip's input."""
    trace, chip = tracer(program, norm, target)
    return trace().lower().compile(), chip


def tracer(program: str, norm: str, target: str) -> tuple[Callable[[], Any], int]:
    """Returns a function that traces one program for a target, and the bytes of one chip's input."""
    network, shape, _ = PROGRAMS[program]
    model = network(NORMS[norm])
    devices = devices_of(target)[:1] if target == "h100" else devices_of(target)
    mesh = Mesh(np.array(devices), ("data",))
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    place = lambda tree: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), tree)  # noqa: E731
    one = jnp.zeros((1, *shape[1:]), jnp.bfloat16)
    variables = place(jax.eval_shape(lambda: model.init(jax.random.key(0), one)))
    x = jax.ShapeDtypeStruct((shape[0] * len(devices), *shape[1:]), jnp.bfloat16, sharding=split)
    chip = int(np.prod(shape)) * 2
    if network is not networks.ResNet50:
        return partial(jax.jit(gradient(model)).trace, variables, x, x), chip
    optimizer = optax.sgd(0.1, momentum=0.9)
    momentum = place(jax.eval_shape(optimizer.init, variables["params"]))
    labels = jax.ShapeDtypeStruct(x.shape[:1], jnp.int32, sharding=split)
    step = jax.jit(training(model, optimizer), donate_argnums=(0, 1))
    return partial(step.trace, variables, momentum, x, labels), chip


def measure(program: str, norm: str, target: str) -> dict[str, Any]:
    """Compiles one program and returns its row of the results."""
    start = time.perf_counter()
    executable, chip = compiled(program, norm, target)
    text = executable.as_text()
    unit, name = (1e9, "GB") if program == "ResNet-50 step" else (chip, "inputs")
    main, branches = hlo.traffic(text)
    reduced, rare = hlo.all_reduces(text)
    return {
        "program": program,
        "norm": norm,
        "target": target,
        "unit": name,
        "traffic": round(main / unit, 3),
        "traffic_of_branches": round(branches / unit, 3),
        "temporary_memory": round(executable.memory_analysis().temp_size_in_bytes / unit, 3),
        "all_reduces": [hlo.elements(payload) for payload in reduced],
        "all_reduces_of_branches": [hlo.elements(p) for payloads in rare.values() for p in payloads],
        "compile_seconds": round(time.perf_counter() - start, 1),
        "ran": "compiled, not run",
        "versions": {name: version(name) for name in ("bnjax", "jax", "flax")},
    }


def rows(pairs: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Yields a row for each program, target and norm."""
    for program, target in pairs:
        for norm in NORMS:
            yield measure(program, norm, target)


def show(row: dict[str, Any]) -> str:
    """Formats a row as one line for the terminal."""
    reduced = row["all_reduces"]
    payload = f"{len(reduced)} all-reduces of at most {max(reduced)} numbers" if reduced else "no all-reduces"
    return (
        f"{row['program']:15s} {row['target']:9s} {row['norm']:21s} traffic {row['traffic']:7.2f} {row['unit']}"
        f" (+{row['traffic_of_branches']:.2f} in branches)  temporary {row['temporary_memory']:6.2f}  {payload}"
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """Options: what is compiled, and where the rows go."""

    quick: bool = False
    """Compile single layers only; rows are written only if --out is given."""
    out: Path | None = None
    """File of JSON lines; a new row replaces an older one of the same program, norm and target."""
    programs: tuple[Literal[*PROGRAMS], ...] = tuple(PROGRAMS)
    """Programs to compile."""
    targets: tuple[Literal[*TARGETS], ...] = TARGETS
    """Targets to compile for; each program is compiled for some of them only."""


def main(config: Config) -> None:
    """Compiles each program for each of its targets, and writes each row as soon as it is known."""
    pairs = [(p, t) for p in config.programs for t in PROGRAMS[p][2] if t in config.targets]
    if config.quick:
        pairs = list(QUICK)
    require({target for _, target in pairs})
    found = []
    for row in rows(pairs):
        print(show(row), flush=True)
        found.append(row)
        if out := config.out or (None if config.quick else RESULTS):
            keep(found, out)


def keep(found: list[dict[str, Any]], out: Path) -> None:
    """Adds rows to the results; a row replaces an older one of the same program, norm and target."""
    key = lambda row: (row["program"], row["target"], row["norm"])  # noqa: E731
    old = jsonl.read(out) if out.exists() else []
    kept = {key(row): row for row in [*old, *found]}
    jsonl.write(out, kept.values())


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
