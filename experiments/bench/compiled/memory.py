"""Temporary memory of conv-BN-ReLU blocks, by their number: what the gradient of one block more has to keep.

Claim:    On the CPU a block more keeps two activations, where flax.linen's keeps three, in float32.
Command:  python -m experiments.bench.compiled.memory     # --targets v5e:2x2 h100 needs pip install "bnjax[aot]"
Hardware: any; the programs are compiled, not run
Time:     1 min for the CPU

The two are the convolution's output, and the block's own output: the next convolution's derivative in its kernel needs
it. XLA:CPU has two schedulers. The default one is for many cores; the sequential one orders for memory, and then the
output may be computed once more, inside the copy that the kernel's derivative makes of it, so that in parts of a deep
network one activation is kept. It is chosen before the process starts, by
XLA_FLAGS=--xla_cpu_enable_concurrency_optimized_scheduler=false; as an option of one compilation it has no effect.
"""

import dataclasses
import os
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import tyro
from jax.sharding import SingleDeviceSharding

import bnjax
from experiments import jsonl
from experiments.bench.compiled.targets import devices_of, require

SEQUENTIAL = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
SHAPES = {  # of the activation; for TPU and GPU too large for on-chip memory
    "cpu": (16, 28, 28, 64),
    "v5e:2x2": (256, 56, 56, 128),
    "h100": (256, 56, 56, 128),
}
DEPTHS = {"cpu": (4, 8, 16, 32), "v5e:2x2": (4, 8, 16), "h100": (4, 8, 16)}
NORMS: dict[str, Callable[..., nn.Module]] = {
    "bnjax": bnjax.BatchNorm,
    "flax.linen": nn.BatchNorm,
    "flax.linen, accurate": partial(nn.BatchNorm, use_fast_variance=False),
}


class Blocks(nn.Module):
    """Repeats conv 3×3 → norm → ReLU `depth` times."""

    norm: Callable[..., nn.Module]
    depth: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = partial(self.norm, use_running_average=False, dtype=x.dtype)
        for _ in range(self.depth):
            x = nn.relu(norm()(nn.Conv(x.shape[-1], (3, 3), use_bias=False, dtype=x.dtype)(x)))
        return x


def activations(norm: str, depth: int, *, target: str = "cpu", dtype: Any = jnp.float32) -> float:
    """Returns the temporary memory of the gradient in all parameters, in units of one activation."""
    model, shape = Blocks(NORMS[norm], depth), SHAPES[target]

    def gradient(variables: Any, x: jax.Array) -> Any:
        def loss_of(params: Any) -> tuple[jax.Array, Any]:
            y, new = model.apply({**variables, "params": params}, x, mutable=["batch_stats"])
            return jnp.mean(jnp.square(y.astype(jnp.float32))), new

        return jax.value_and_grad(loss_of, has_aux=True)(variables["params"])

    sharding = SingleDeviceSharding(devices_of(target)[0])
    x = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    variables = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        jax.eval_shape(model.init, jax.random.key(0), x),
    )
    memory = jax.jit(gradient).lower(variables, x).compile().memory_analysis().temp_size_in_bytes
    return memory / (x.size * jnp.dtype(dtype).itemsize)


def measure(norm: str, target: str, dtype: str) -> dict[str, Any]:
    """Returns one row: the memory at each depth, and the memory per additional block between first and last depth."""
    depths = DEPTHS[target]
    found = [activations(norm, depth, target=target, dtype=jnp.dtype(dtype)) for depth in depths]
    return {
        "part": "memory",
        "target": target,
        "scheduler": "sequential" if target == "cpu" and SEQUENTIAL in os.environ.get("XLA_FLAGS", "") else "default",
        "dtype": dtype,
        "norm": norm,
        "activation": list(SHAPES[target]),
        "jax": jax.__version__,
        "depths": list(depths),
        "activations": [round(a, 2) for a in found],
        "of_one_block_more": round((found[-1] - found[0]) / (depths[-1] - depths[0]), 2),
    }


@dataclasses.dataclass(frozen=True)
class Config:
    """Options: what is compiled."""

    targets: tuple[Literal["cpu", "v5e:2x2", "h100"], ...] = ("cpu",)
    """Targets to compile for."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32",)
    """Dtypes of the activations."""


def main(config: Config) -> None:
    """Prints a JSON line for each target, dtype and norm."""
    require(config.targets)
    for target in config.targets:
        for dtype in config.dtypes:
            for norm in NORMS:
                print(jsonl.text(measure(norm, target, dtype)), end="", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
