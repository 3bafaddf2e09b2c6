"""Would a Pallas kernel that reads x: `[N, C]` once save traffic on a TPU? In a network XLA's fusions save more.

Claim:    Alone a kernel that keeps [N, 128] of x in VMEM makes 5 passes over x, XLA 8. In a Transformer block whose
          activations lie in main memory it moves more bytes than XLA: 2.5 activations per layer, the backward kernel
          alone 1; in an MLP 2 and 0. At [8192, 1024], on chip, it moves fewer than XLA.
Command:  python -m experiments.bench.compiled.pallas_rows  # pip install "bnjax[aot]"; --programs and --fits choose
Hardware: any; the programs are compiled for one chip of TPU v5e, not run
Time:     15 min on 2 CPU cores
"""

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

from experiments.bench.compiled import hlo
from experiments.bench.compiled.aot import gradient, keep  # before JAX makes a device
from experiments.bench.compiled.targets import devices_of, missing

import flax.linen as nn  # isort: skip
import jax  # isort: skip
import jax.numpy as jnp  # isort: skip
from jax.sharding import SingleDeviceSharding  # isort: skip

import bnjax  # isort: skip
from experiments.bench.compiled.pallas_kernels import MIB, VMEM, How, batch_norm  # isort: skip

RESULTS = Path(__file__).parents[1] / "results" / "pallas_rows.jsonl"
TARGET = "v5e:2x2"
TEXT = """# A Pallas kernel that reads rows once, beside XLA

Made by `python -m experiments.bench.compiled.pallas_rows` with {versions}: forward and backward in
bfloat16, compiled for one chip of TPU {target}, not run. Traffic and temporary memory are in units of the input; the
branches that a steady state does not run stand apart; a kernel counts as its operands and results, once. Arrays of
256 MiB, [32768, 4096] and [16384, 8192], cannot stay in VMEM; of smaller ones the compiler keeps some there, where they
are not counted.

- **Alone** a kernel wins. (flax.linen's 7 passes are of this program only: where dy is an argument, the pass that
  sums it can write y too.)
- **In a network** XLA's passes are fewer than alone: the matmul that makes x, or dy, also sums it, those that read
  y normalise x on its way in, and dx takes in the derivative of the residual. A kernel forbids all of that, so the
  Transformer block moves more bytes with one, forward and backward or backward alone.
- **An exception**: at [8192, 1024], where an activation of 16 MiB stays in VMEM, the block with both kernels moves
  fewer bytes than either of XLA's. What is counted there depends on what the compiler keeps on chip: bnjax and
  flax.linen, which agree at [32768, 4096], differ by more than the kernels gain over the better of them. The
  cause of either difference is not known.
- **Dense-BN-ReLU**, with ReLU inside the kernels: from 4 layers to 8 the backward kernel gains nothing more. What it
  gains is at the end, where dy is an argument and no matmul is there to sum it.
- **Over several chips** the sums are exchanged between the two reads of x. Stopped there for XLA's all-reduce, a kernel
  reads x again: 3 passes forward, 5 backward, as XLA alone, and without its fusions. For one read the blocks stay
  in VMEM during the exchange, which is then the kernel's own, under `shard_map`: a barrier of all chips, remote
  copies of 2 × 128 numbers per block and direction, and two blocks or more at work to hide the wait. Under plain
  `jit` a sharded batch does not compile: XLA cannot partition a Mosaic kernel.
- **The batch of a chip** is limited: the backward kernel holds three blocks [N, 128], each twice, to fetch one while
  it works on another. XLA has no such limit.

**Decision**: no kernel in bnjax, for the compiled Transformer block does not move fewer bytes where activations lie in
main memory; at the one size where it does the gain over flax.linen is small, and it ends at one chip.
"""


def origin() -> dict[str, Any]:
    """What belongs to every row of the results."""
    versions = {name: version(name) for name in ("bnjax", "jax", "flax", "libtpu")}
    return {"target": TARGET, "ran": "compiled, not run", "versions": versions}


class PallasNorm(nn.Module):
    """BatchNorm in training mode, by the kernels."""

    how: How

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size = x.shape[-1:]
        scale, bias = self.param("scale", nn.initializers.ones, size), self.param("bias", nn.initializers.zeros, size)
        y, *moments = batch_norm(self.how, x.reshape(-1, *size), scale, bias)
        for name, start, new in zip(("mean", "var"), (jnp.zeros, jnp.ones), moments, strict=True):
            running = self.variable("batch_stats", name, start, size)
            running.value = 0.99 * running.value + 0.01 * new
        return y.reshape(x.shape)


class LinenNorm(nn.Module):
    """flax.linen's fast mode, and ReLU after it where asked for."""

    relu: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.BatchNorm(use_running_average=False, dtype=x.dtype)(x)
        return nn.relu(y) if self.relu else y


def _bnjax(relu: bool) -> nn.Module:
    return bnjax.BatchNorm(use_running_average=False, dtype=jnp.bfloat16, activation=nn.relu if relu else None)


Norm = Callable[[bool], nn.Module]  # with ReLU or without
NORMS: dict[str, Norm] = {
    "bnjax": _bnjax,
    "flax.linen": LinenNorm,
    "Pallas": lambda relu: PallasNorm(How(relu)),
    "Pallas, backward only": lambda relu: PallasNorm(How(relu, forward=False)),
}


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    norm: Norm

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = partial(nn.Dense, dtype=x.dtype)
        y = self.norm(False)(x)
        x = x + nn.MultiHeadDotProductAttention(x.shape[-1] // 64, dtype=x.dtype)(y, y)
        return x + dense(x.shape[-1])(nn.gelu(dense(4 * x.shape[-1])(self.norm(False)(x))))


class MLP(nn.Module):
    """Several times Dense → norm → ReLU."""

    norm: Norm
    layers: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(self.layers):
            x = self.norm(True)(nn.Dense(x.shape[-1], use_bias=False, dtype=x.dtype)(x))
        return x


class Layer(nn.Module):
    """The norm and nothing else."""

    norm: Norm

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(False)(x)


PROGRAMS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "layer [16384, 8192]": (Layer, (16384, 8192)),
    "4 Dense-BN-ReLU [16384, 8192]": (partial(MLP, layers=4), (16384, 8192)),
    "8 Dense-BN-ReLU [16384, 8192]": (partial(MLP, layers=8), (16384, 8192)),
    "4 Dense-BN-ReLU [16384, 1024]": (partial(MLP, layers=4), (16384, 1024)),
    "block [32768, 4096]": (TransformerBlock, (128, 256, 4096)),
    "block [32768, 1024]": (TransformerBlock, (128, 256, 1024)),
    "block [16384, 1024]": (TransformerBlock, (64, 256, 1024)),
    "block [8192, 1024]": (TransformerBlock, (32, 256, 1024)),
}


def compiled(model: nn.Module, shape: tuple[int, ...], sharding: Any, dtype: Any = jnp.bfloat16) -> Any:
    """y, its derivatives in all parameters and x, and the running averages."""
    place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)  # noqa: E731
    init = lambda: model.init(jax.random.key(0), jnp.zeros((2, *shape[1:]), dtype))  # noqa: E731
    x = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    return jax.jit(gradient(model)).lower(jax.tree.map(place, jax.eval_shape(init)), x, x).compile()


def measure(program: str, norm: str, sharding: Any) -> dict[str, Any]:
    """One row of the results."""
    start, (network, shape) = time.perf_counter(), PROGRAMS[program]
    executable, unit = compiled(network(NORMS[norm]), shape, sharding), 2 * math.prod(shape)
    text = executable.as_text()
    found, entry = hlo.computations(text)
    count = Counter(op.opcode.removesuffix("-start") for op in found[entry])
    main, branches = hlo.traffic(text)
    return {
        "program": program,
        "norm": norm,
        "traffic": round(main / unit, 2),
        "traffic_of_branches": round(branches / unit, 2),
        "gigabytes": round(main / 1e9, 3),
        "temporary_memory": round(executable.memory_analysis().temp_size_in_bytes / unit, 2),
        "fusions": count["fusion"],
        "copies": count["copy"],
        "compile_seconds": round(time.perf_counter() - start, 1),
        **origin(),
    }


def largest(dtype: Any, how: How, sharding: Any) -> int:
    """The most rows, in steps of 4096, whose kernels the compiler finds room for."""
    model, rows = Layer(lambda _: PallasNorm(how)), 0
    while True:
        try:
            compiled(model, (rows + 4096, 1024), sharding, dtype)
        except jax.errors.JaxRuntimeError as error:
            if "memory space vmem" not in str(error):
                raise
            return rows
        rows += 4096


def room(sharding: Any) -> Iterator[dict[str, Any]]:
    """Rows of the results on how large a batch of one chip may be."""
    for dtype in ("bfloat16", "float32"):
        for limit in (None, VMEM):
            rows = largest(dtype, How(vmem=limit), sharding)
            norm = f"Pallas, {(limit or 16 * MIB) // MIB} MiB"
            yield {"program": f"largest N in {dtype}", "norm": norm, "rows": rows, **origin()}


def write_table() -> None:
    """The Markdown beside the JSON lines."""
    found = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    found = sorted(found, key=lambda row: [*PROGRAMS, row["program"]].index(row["program"]))
    versions = ", ".join(f"{name} {number}" for name, number in origin()["versions"].items())
    ours = {row["program"]: row["traffic"] for row in found if row["norm"] == "bnjax"}
    names = ("program", "norm", "traffic", "over_bnjax", "traffic_of_branches", "gigabytes", "temporary_memory")
    names += ("fusions", "copies")
    lines = [TEXT.format(versions=versions, target=TARGET), "| " + " | ".join(names).replace("_", " ") + " |"]
    lines += ["|---" * len(names) + "|"]
    for row in found:
        if "traffic" in row:
            row["over_bnjax"] = f"{row['traffic'] - ours[row['program']]:+.2f}"
            lines += ["| " + " | ".join(str(row[name]) for name in names) + " |"]
    lines += ["", "| x | kernels may use | rows |", "|---|---|---|"]
    lines += [f"| {row['program']} | {row['norm']} | {row['rows']} |" for row in found if "rows" in row]
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", nargs="*", default=list(PROGRAMS), choices=list(PROGRAMS))
    parser.add_argument("--fits", action="store_true", help="only look how many rows VMEM takes")
    args = parser.parse_args()
    if reason := missing(TARGET):
        parser.error(reason)
    sharding = SingleDeviceSharding(devices_of(TARGET)[0])
    measured = (measure(program, norm, sharding) for program in args.programs for norm in NORMS)
    for row in room(sharding) if args.fits else chain(measured, room(sharding)):
        print(row, flush=True)
        keep([row], RESULTS)
        write_table()


if __name__ == "__main__":
    main()
