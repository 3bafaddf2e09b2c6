"""One layer, forward and backward, on the CPU: what a pivot costs, beside Flax and a floor of four plain passes.

Claim:    The exact layer takes about 1.2 times the floor with a zero pivot, 1.6 with another; Flax's inexact one 1.9.
Command:  python -m experiments.bench.pivot
Hardware: 2 CPU cores, nothing else running
Time:     60 s

The floor reads x; reads x and writes y; reads x and dy; reads both and writes dx. Outputs are donated, for page faults
of fresh buffers cost more than the arithmetic; the order is shuffled in each round, and the second of two calls counts.
"""

import random
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import bnjax

SHAPES = ((32, 56, 56, 64), (32, 28, 28, 128))
ROUNDS = 30
ROWS = (0, 1, 2)
Step = Callable[..., Any]


def floor(x: jax.Array, dy: jax.Array, running: Any, *_: jax.Array) -> Any:
    """Four plain passes; the tiny factors only make each depend on the one before."""
    total = jnp.sum(x, ROWS)
    y = x * running["var"] + total * 1e-9
    pull = jnp.sum(dy * x, ROWS)
    return y, dy * running["var"] + x * (pull * 1e-9), total


def layer(module: Any) -> Step:
    """y, dx and everything that a training step takes from the layer."""

    def step(x: jax.Array, dy: jax.Array, running: Any, *_: jax.Array) -> Any:
        params = dict(scale=jnp.ones(x.shape[-1]), bias=jnp.zeros(x.shape[-1]))

        def forward(params: Any, x: jax.Array) -> Any:
            return module.apply(dict(params=params, batch_stats=running), x, mutable=["batch_stats"])

        y, pullback, updates = jax.vjp(forward, params, x, has_aux=True)
        grads, dx = pullback(dy)
        return y, dx, grads, updates

    return step


def candidates(channels: int) -> dict[str, tuple[Step, float]]:
    """Each step with the running mean that it is given."""
    train = dict(use_running_average=False)
    ours = layer(bnjax.BatchNorm(**train))
    return {
        "floor": (floor, 0.0),
        "bnjax, pivot zero": (ours, 0.0),
        "bnjax, pivot not zero": (ours, 5.0),  # beyond two standard deviations: worth subtracting
        "flax.linen": (layer(nn.BatchNorm(**train)), 0.0),
        "flax.linen, accurate": (layer(nn.BatchNorm(**train, use_fast_variance=False)), 0.0),
    }


def measure(shape: tuple[int, ...]) -> dict[str, list[float]]:
    """Seconds of every round, per candidate."""
    rng = np.random.default_rng(0)
    noise, dy = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    buffers = [jnp.zeros(shape), jnp.zeros(shape)]
    runs = {}
    for name, (step, mean) in candidates(shape[-1]).items():
        running = dict(mean=jnp.full(shape[-1], mean), var=jnp.ones(shape[-1]))
        runs[name] = (jax.jit(step, donate_argnums=(3, 4)), noise + mean, running)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name in random.sample(list(runs), len(runs)):
            step, x, running = runs[name]
            for _ in range(2):
                start = time.perf_counter()
                out = jax.block_until_ready(step(x, dy, running, *buffers))
                seconds, buffers = time.perf_counter() - start, [out[0], out[1]]
            times[name].append(seconds)
    return times


def main() -> None:
    for shape in SHAPES:
        times = {name: np.array(values[3:]) for name, values in measure(shape).items()}  # the first rounds warm up
        print(f"{shape} float32, floor {np.median(times['floor']) * 1e3:.2f} ms")
        for name, values in times.items():
            ratio = np.median(values) / np.median(times["floor"])
            print(f"  {name:22s} {ratio:.2f} of the floor (minima {values.min() / times['floor'].min():.2f})")


if __name__ == "__main__":
    main()
