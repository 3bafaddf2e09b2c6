"""Times formulations of one layer on the CPU, forward and backward, beside the one that bnjax uses.

Claim:    The closed form on plain sums is the fastest that XLA:CPU makes, in bfloat16 with a conversion for each sum.
Command:  python -m experiments.bench.clock.tried       # --quick takes 10 s
Hardware: 2 CPU cores, nothing else running
Time:     2 min

Every candidate is a whole layer: y and dx from x and dy. All but those named bnjax are short and inexact (no guard, no
running averages), because the question is how XLA compiles their sums. Times are in multiples of a floor of four plain
passes over memory; passes are the bytes that XLA counts, divided by the bytes of the activation.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax

import bnjax
from experiments.bench import report
from experiments.bench.clock import layers, peers
from experiments.bench.clock.timing import interleaved

SHAPES = ((32, 56, 56, 64), (32, 28, 28, 128), (8192, 1024))
Sums = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]  # x, y: Σy and Σxy
Step = Callable[[jax.Array, jax.Array], Any]  # x, dy: y, dx


def _wide(x: jax.Array) -> jax.Array:
    """Converts x to float32."""
    return x.astype(jnp.float32)


def _rows(x: jax.Array) -> tuple[int, ...]:
    """Returns all axes but the last, over which the sums run."""
    return tuple(range(x.ndim - 1))


def plain(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes Σy and Σxy; a value in half precision is converted once for both."""
    return jnp.sum(_wide(y), _rows(x)), jnp.sum(_wide(x) * _wide(y), _rows(x))


def apart(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes Σy and Σxy, each with its own conversion: barriers of different depth keep XLA from merging them."""
    once = lax.optimization_barrier(y)
    twice = lax.optimization_barrier(once)
    other = twice if x is y else lax.optimization_barrier(x)
    return jnp.sum(_wide(once), _rows(x)), jnp.sum(_wide(other) * _wide(twice), _rows(x))


def flat(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes Σy and Σxy over a reshape to rank 2."""
    return plain(x.reshape(-1, x.shape[-1]), y.reshape(-1, x.shape[-1]))


def blocks(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes Σy and Σxy over 64 blocks of rows, so that the second sum of a block may find it in the cache."""
    x, y = (_wide(v).reshape(64, -1, v.shape[-1]) for v in (x, y))
    s1, s2 = lax.map(lambda b: (jnp.sum(b[1], 0), jnp.sum(b[0] * b[1], 0)), (x, y))
    return s1.sum(0), s2.sum(0)


def together(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes Σy and Σxy in one reduction with two results, so that x is read once."""
    add = lambda a, b: (a[0] + b[0], a[1] + b[1])  # noqa: E731
    zeros = (np.float32(0), np.float32(0))
    return lax.reduce((_wide(y), _wide(x) * _wide(y)), zeros, add, _rows(x))


def product(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes Σy and Σxy as matrix products with ones."""
    x, y = (v.reshape(-1, v.shape[-1]) for v in (x, y))
    ones = jnp.ones(len(x), x.dtype)
    dot = partial(jnp.einsum, preferred_element_type=jnp.float32)
    return dot("n,nc->c", ones, y), dot("nc,nc->c", x, y)


def bits(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes Σy and Σxy of bfloat16 input, widened by shifting its bits as integers."""

    def wide(v: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(lax.bitcast_convert_type(v, jnp.uint16).astype(jnp.uint32) << 16, jnp.float32)

    return jnp.sum(wide(y), _rows(x)), jnp.sum(wide(x) * wide(y), _rows(x))


def grouped(sums: Sums, x: jax.Array, dy: jax.Array, K: float = 0.0) -> tuple[jax.Array, jax.Array]:
    """Computes y = (x − K)·a + c and dx = dy·a + (x − K)·b + d: two products per element, the rest per channel."""
    centred = x - jnp.asarray(K, x.dtype) if K else x
    n = x.size // x.shape[-1]
    mean, square = (s / n for s in sums(centred, centred))
    a = lax.rsqrt(square - mean**2 + 1e-5)
    y = (_wide(centred) * a - mean * a).astype(x.dtype)
    t1, t2 = (s / n for s in sums(centred, dy))
    b = -(t2 - mean * t1) * a**3
    return y, (_wide(dy) * a + _wide(centred) * b - (t1 * a + mean * b)).astype(x.dtype)


def spread(x: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes xhat = (x − mean)·rstd and dx = (dy − mean(dy) − xhat·mean(dy·xhat))·rstd, the textbook form."""
    wide, dwide = _wide(x), _wide(dy)
    mean = jnp.mean(wide, _rows(x))
    rstd = lax.rsqrt(jnp.mean(wide**2, _rows(x)) - mean**2 + 1e-5)
    xhat = (wide - mean) * rstd
    dx = (dwide - jnp.mean(dwide, _rows(x)) - xhat * jnp.mean(dwide * xhat, _rows(x))) * rstd
    return xhat.astype(x.dtype), dx.astype(x.dtype)


def naive(x: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes y with the variance E[x²] − E[x]², and dx by autodiff."""

    def forward(x: jax.Array) -> jax.Array:
        wide = _wide(x)
        mean = jnp.mean(wide, _rows(x))
        var = jnp.mean(wide**2, _rows(x)) - mean**2
        return ((wide - mean) * lax.rsqrt(var + 1e-5)).astype(x.dtype)

    y, pullback = jax.vjp(forward, x)
    return y, *pullback(dy)


def module(kind: Any, x: jax.Array, dy: jax.Array) -> Any:
    """Runs a library's layer forward and backward."""
    ones = jnp.ones(x.shape[-1])
    layer, stats = kind(use_running_average=False, dtype=x.dtype), dict(mean=0 * ones, var=ones)

    def forward(params: Any, x: jax.Array) -> Any:
        return layer.apply(dict(params=params, batch_stats=stats), x, mutable=["batch_stats"])

    y, pullback, updates = jax.vjp(forward, dict(scale=ones, bias=0 * ones), x, has_aux=True)
    grads, dx = pullback(dy)
    return y, dx, grads, updates


TRIED: dict[str, tuple[Step, str]] = {  # candidate: its step, and the advantage expected of it
    "bnjax": (partial(module, bnjax.BatchNorm), "exact: with the guard, and running averages too"),
    "bnjax, mean far from 0": (partial(module, bnjax.BatchNorm), "x + 8: the guard sums again about the mean"),
    "flax.linen": (partial(module, nn.BatchNorm), "autodiff, inexact"),
    "grouped": (partial(grouped, plain), "the least that a closed form can do"),
    "spread": (spread, "the closed form of textbooks"),
    "naive": (naive, "no derivative of one's own"),
    "grouped, pivot in every sum": (partial(grouped, plain, K=0.5), "no branch, and exact near the pivot"),
    "grouped, rank 2": (partial(grouped, flat), "fewer axes for the loops"),
    "grouped, blocks of rows": (partial(grouped, blocks), "the second sum finds x in the cache"),
    "grouped, one reduction": (partial(grouped, together), "x is read once for two sums"),
    "grouped, matrix products": (partial(grouped, product), "the library of matrix products"),
    "grouped, sums apart": (partial(grouped, apart), "conversions that no two sums share"),
    "grouped, bits": (partial(grouped, bits), "integer arithmetic in place of a conversion"),
}
FAR = {"bnjax, mean far from 0": 8.0}  # added to x, whose standard deviation is 1
ONLY_BFLOAT16 = ("grouped, sums apart", "grouped, bits")


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the benchmark: what is measured, and where the results go."""

    out: Path = report.RESULTS
    """Folder of tried.jsonl and tried.md."""
    rounds: int = 21
    """Largest number of rounds of each comparison."""
    seconds: float = 15.0
    """After the first five rounds, a comparison ends when this time is over."""
    quick: bool = False
    """Measure one small shape, and write nothing."""


def measure(config: Config) -> Iterator[dict[str, Any]]:
    """Yields a row for each candidate, shape and dtype."""
    for shape in ((16, 8, 8, 32),) if config.quick else SHAPES:
        x, dy = (np.random.default_rng(seed).standard_normal(shape, np.float32) for seed in (0, 1))
        for name, dtype in layers.DTYPES.items():
            steps = {k: step for k, (step, _) in TRIED.items() if name == "bfloat16" or k not in ONLY_BFLOAT16}
            runs = {k: peers.compiled_run(step, (), x + FAR.get(k, 0.0), dy, dtype) for k, step in steps.items()}
            floor = peers.floor_run("forward + backward", x, dy, dtype)
            times = interleaved(runs | {"floor": floor}, rounds=config.rounds, seconds=config.seconds)
            for candidate, step in steps.items():
                seconds, ratio = times[candidate], times[candidate].median / times["floor"].median
                yield {
                    "tried": candidate,
                    "shape": list(shape),
                    "dtype": name,
                    "milliseconds": round(seconds.median * 1e3, 3),
                    "spread": round(seconds.spread, 3),
                    "over_floor": round(ratio, 3),
                    "passes": passes(step, jnp.asarray(x, dtype)),
                }


def passes(step: Step, x: jax.Array) -> float:
    """Returns the bytes that XLA counts, in units of the activation; both sides of a branch are included."""
    cost = jax.jit(step).lower(x, x).compile().cost_analysis()
    return round(cost["bytes accessed"] / x.nbytes, 2)


def table(rows: list[dict[str, Any]]) -> str:
    """Makes a Markdown table of times (in multiples of the floor) and passes, by candidate."""
    columns = list(dict.fromkeys((tuple(row["shape"]), row["dtype"]) for row in rows))
    found = {(row["tried"], tuple(row["shape"]), row["dtype"]): row for row in rows}
    lines = []
    for name, (_, why) in TRIED.items():
        here = [found.get((name, *column)) for column in columns]
        lines.append((name, *(f"{row['over_floor']:.2f} ({row['passes']:.0f})" if row else "" for row in here), why))
    return report.table(("tried", *(f"{s} {d}" for s, d in columns), "what it was to be good for"), lines)


def main(config: Config) -> None:
    """Measures, prints, and writes rows and page."""
    rows = report.shown(measure(config), lambda row: report.timed(row, "shape", "dtype", "tried"))
    print("\n" + table(rows))
    if not config.quick:
        text = f"Times of the floor (passes over the activation, by XLA's count).\n\n{table(rows)}"
        report.keep(rows, config.out, "clock.tried", "Formulations of one layer on the CPU", text)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
