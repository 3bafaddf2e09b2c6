"""Compares memory and work of the full batch's gradient: computed at once, or in micro-batches that share statistics.

Claim:    Micro-batches over a mapped axis with rematerialised blocks give the gradient of the full batch in two
          thirds of the memory, for one more forward pass (compiled for TPU v5e, not run).
Command:  python -m experiments.bench.compiled.accumulation  # needs pip install "bnjax[aot]"
Hardware: 2 CPU cores; the program is compiled for one v5e chip, and the figures are its compiler's
Time:     2 min
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import tyro
from jax.sharding import SingleDeviceSharding

import bnjax
from experiments.bench.compiled.targets import devices_of, require

BATCH, SIZE, CHANNELS, BLOCKS, MICRO = 1024, 32, 128, 8, 8


class Block(nn.Module):
    """Conv 3×3 → BN → ReLU; under `axis_name`, statistics are pooled over the mapped axis."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(CHANNELS, (3, 3), use_bias=False)(x)
        return nn.relu(bnjax.BatchNorm(use_running_average=False, axis_name=self.axis_name)(x, update_stats=False))


class Net(nn.Module):
    """`BLOCKS` blocks, optionally rematerialized in the backward pass, and a mean over positions."""

    remat: bool = False
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        block = nn.remat(Block) if self.remat else Block
        for i in range(BLOCKS):
            x = block(axis_name=self.axis_name, name=f"block{i}")(x)
        return x.mean((-3, -2))


def loss_of(remat: bool, micro: bool) -> Callable[[Any, jax.Array], jax.Array]:
    """Returns a loss Σ y² over the batch, normalized by the statistics of all of it."""
    net = Net(remat, "micro" if micro else None)

    def loss(variables: Any, x: jax.Array) -> jax.Array:
        if not micro:
            return jnp.sum(net.apply(variables, x) ** 2)
        parts = x.reshape(MICRO, -1, *x.shape[1:])
        return jnp.sum(jax.vmap(lambda part: net.apply(variables, part), axis_name="micro")(parts) ** 2)

    return loss


def main() -> None:
    """Compiles the gradient in four ways, and prints temporary memory and work of each."""
    require(["v5e:2x2"])
    chip = devices_of("v5e:2x2")[0]
    on_chip = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=SingleDeviceSharding(chip))  # noqa: E731
    x = on_chip(jnp.zeros((), jnp.float32)).update(shape=(BATCH, SIZE, SIZE, CHANNELS))
    shapes = jax.eval_shape(lambda: Net().init(jax.random.key(0), jnp.ones((1, SIZE, SIZE, CHANNELS))))
    variables, activation = jax.tree.map(on_chip, shapes), x.size * 4
    for name, remat, micro in (
        ("full batch", False, False),
        ("full batch, blocks rematerialised", True, False),
        (f"{MICRO} micro-batches over a mapped axis", False, True),
        (f"{MICRO} micro-batches, blocks rematerialised", True, True),
    ):
        compiled = jax.jit(jax.grad(loss_of(remat, micro))).lower(variables, x).compile()
        memory = compiled.memory_analysis().temp_size_in_bytes / activation
        work = compiled.cost_analysis()["flops"] / (2 * 9 * CHANNELS * x.size)
        print(f"{name:45s} temporary memory {memory:5.1f} activations   work {work:5.1f} convolutions")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
