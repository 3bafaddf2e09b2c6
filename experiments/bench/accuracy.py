"""Errors of mean, variance, y and dx against float64 as the data moves away from zero, beside every peer.

Claim:    From the first batch on, bnjax is as accurate at a mean of 10^5 standard deviations as at zero.
Command:  python -m experiments.bench.accuracy
Hardware: 2 CPU cores
Time:     60 s
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata, util
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

import bnjax

EPSILON = 1e-5
RATIOS = (0.0, 1.0, 1e1, 1e2, 1e3, 1e4, 1e5)  # mean/std of every channel
SHAPE = (64, 16, 16, 8)
ROWS = (0, 1, 2)
HALF_MAX = 65504.0


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured, and where it goes."""

    out: Path = Path(__file__).parent / "results"
    """Folder of accuracy.jsonl and accuracy.md."""
    picture: Path = Path(__file__).parents[2] / "docs" / "assets" / "accuracy.png"
    """The errors of y and dx by mean/std."""
    quick: bool = False
    """Three ratios in float32 only; nothing is written."""
    redraw: bool = False
    """Measure nothing: the picture alone, of the committed numbers."""


class Batch(NamedTuple):
    x: np.ndarray
    dy: np.ndarray
    running_mean: np.ndarray  # [C], float32: zeros in the first step, about the mean in a steady state
    running_var: np.ndarray  # [C]


class Answer(NamedTuple):
    mean: Any  # [C]
    var: Any  # [C]
    y: Any
    dx: Any


def reference(batch: Batch) -> Answer:
    """The textbook formulas in NumPy float64."""
    x, dy = batch.x.astype(np.float64), batch.dy.astype(np.float64)
    mean, var = x.mean(ROWS), x.var(ROWS)
    rstd = (var + EPSILON) ** -0.5
    y = (x - mean) * rstd
    return Answer(mean, var, y, rstd * (dy - dy.mean(ROWS) - y * (dy * y).mean(ROWS)))


def _answer(forward: Callable[[Any, Batch], tuple[Any, Any, Any]], batch: Batch) -> Answer:
    """mean, var and y of `forward`, and the gradient of Σ y·dy, compiled together."""

    def loss(x: Any) -> Any:
        mean, var, y = forward(x, batch)
        y = y.astype(jnp.float32)
        return jnp.sum(y * batch.dy), (mean, var, y)

    dx, (mean, var, y) = jax.jit(jax.grad(loss, has_aux=True))(jnp.asarray(batch.x))
    return Answer(mean, var, y, dx)


def _linen(module: Any, x: Any, batch: Batch) -> tuple[Any, Any, Any]:
    """Momentum 0, so that the new running statistics are those of the batch."""
    stats = {"mean": jnp.asarray(batch.running_mean), "var": jnp.asarray(batch.running_var)}
    y, updates = module.apply({"batch_stats": stats}, x, mutable=["batch_stats"])
    return updates["batch_stats"]["mean"], updates["batch_stats"]["var"], y


def _nnx(module: Any, x: Any, batch: Batch) -> tuple[Any, Any, Any]:
    plain = dict(use_running_average=False, momentum=0.0, use_scale=False, use_bias=False)
    layer = module(x.shape[-1], **plain, rngs=nnx.Rngs(0))
    layer.mean[...], layer.var[...] = jnp.asarray(batch.running_mean), jnp.asarray(batch.running_var)
    y = layer(x)
    return layer.mean[...], layer.var[...], y


def _torch(batch: Batch) -> Answer:
    """PyTorch's layer over NCHW (its channels-last kernel is less accurate); its variance is divided by n − 1."""
    import torch

    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[str(batch.x.dtype)]
    to_torch = lambda a: torch.from_numpy(np.ascontiguousarray(np.moveaxis(a.astype(np.float32), -1, 1)))  # noqa: E731
    layer = torch.nn.BatchNorm2d(batch.x.shape[-1], eps=EPSILON, momentum=1.0)
    x = to_torch(batch.x).to(dtype).requires_grad_()
    y = layer(x)
    (y.float() * to_torch(batch.dy)).sum().backward()
    n = batch.x.size // batch.x.shape[-1]
    back = lambda t: np.moveaxis(t.detach().float().numpy(), 1, -1)  # noqa: E731
    return Answer(layer.running_mean.numpy(), layer.running_var.numpy() * ((n - 1) / n), back(y), back(x.grad))


def peers() -> dict[str, Callable[[Batch], Answer]]:
    """Every implementation there is on this machine."""
    plain = dict(use_running_average=False, momentum=0.0, use_scale=False, use_bias=False)
    found = {
        "bnjax": partial(_answer, partial(_linen, bnjax.BatchNorm(**plain))),
        "flax.linen": partial(_answer, partial(_linen, nn.BatchNorm(**plain))),
        "flax.linen, accurate": partial(_answer, partial(_linen, nn.BatchNorm(**plain, use_fast_variance=False))),
        "flax.nnx": partial(_answer, partial(_nnx, nnx.BatchNorm)),
    }
    if util.find_spec("torch"):
        found["torch"] = _torch
    else:
        print("torch is not installed: left out", file=sys.stderr)
    return found


def draw(dtype: str, ratio: float, step: str) -> Batch:
    """A batch whose channels all have this mean/std, with running statistics of the first step or of a steady state."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=SHAPE) + ratio).astype(jnp.dtype(dtype))
    mean = x.astype(np.float64).mean(ROWS) + 0.01 if step == "steady" else np.zeros(SHAPE[-1])
    ones = np.ones(SHAPE[-1], np.float32)
    return Batch(x, rng.normal(size=SHAPE).astype(np.float32), mean.astype(np.float32), ones)


def errors(got: Answer, want: Answer) -> dict[str, float]:
    """mean in standard deviations, var relative, y absolute (it is standardised), dx relative to its largest value."""
    std = np.sqrt(want.var + EPSILON)
    wide = Answer(*(np.asarray(v, np.float64) for v in got))
    return {
        "mean": float(np.max(np.abs(wide.mean - want.mean) / std)),
        "var": float(np.max(np.abs(wide.var - want.var) / (want.var + EPSILON))),
        "y": float(np.max(np.abs(wide.y - want.y))),
        "dx": float(np.max(np.abs(wide.dx - want.dx)) / np.max(np.abs(want.dx))),
    }


def measure(config: Config) -> Iterator[dict[str, Any]]:
    """One row per implementation, dtype, step and ratio."""
    candidates = peers()
    dtypes = ("float32",) if config.quick else ("float32", "bfloat16", "float16")
    for dtype in dtypes:
        for ratio in RATIOS[::3] if config.quick else RATIOS:
            if dtype == "float16" and ratio * 1.5 > HALF_MAX:
                continue  # the data itself does not fit
            for step in ("first", "steady"):
                batch = draw(dtype, ratio, step)
                want = reference(batch)
                for name, run in candidates.items():
                    yield dict(peer=name, dtype=dtype, ratio=ratio, step=step, **errors(run(batch), want))


COLUMNS = ("mean", "var", "y", "dx")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one line per dtype, ratio, step and implementation."""
    lines = ["| dtype | mean/std | step | implementation | mean | var | y | dx |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = " | ".join("NaN" if np.isnan(row[c]) else f"{row[c]:.0e}" for c in COLUMNS)
        lines.append(f"| {row['dtype']} | {row['ratio']:g} | {row['step']} | {row['peer']} | {cells} |")
    return "\n".join(lines)


STYLES = {
    "bnjax": dict(color="C0", lw=2.5, zorder=3, marker="o"),
    "flax.linen, accurate": dict(color="C2", marker="s"),
    "torch": dict(color="C4", marker="^", ls="--"),
    "flax.linen": dict(color="C3", marker="D"),
}


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Errors of y and dx in the first step in float32; flax.nnx computes as flax.linen and is left out."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    for axes, column in zip(figure.subplots(1, 2, sharey=True), ("y", "dx"), strict=True):
        for peer, style in STYLES.items():
            here = [r for r in rows if (r["peer"], r["dtype"], r["step"]) == (peer, "float32", "first") and r["ratio"]]
            axes.loglog([r["ratio"] for r in here], [r[column] for r in here], label=peer, ms=4, **style)
        axes.set(xlabel="mean / standard deviation of a channel", title=f"largest error of {column}")
        axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=100)


def committed(config: Config) -> list[dict[str, Any]]:
    """The lines of the last run."""
    lines = [json.loads(line) for line in (config.out / "accuracy.jsonl").read_text().splitlines()]
    return [line for line in lines if "peer" in line]


def versions() -> dict[str, str]:
    names = [n for n in ("jax", "flax", "torch", "numpy") if util.find_spec(n)]
    return {name: metadata.version(name) for name in names}


def main(config: Config) -> None:
    if config.redraw:
        return plot(committed(config), config.picture)
    rows = []
    for row in measure(config):
        rows.append(row)
        print(f"{row['dtype']:9s} {row['ratio']:8g} {row['step']:7s} {row['peer']:21s}", end="")
        print("  ".join(f"{c} {row[c]:.1e}" for c in COLUMNS))
    if config.quick:
        return
    config.out.mkdir(parents=True, exist_ok=True)
    lines = [dict(kind="versions", **versions()), *rows]
    (config.out / "accuracy.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (config.out / "accuracy.md").write_text(_document(rows))
    plot(rows, config.picture)
    print(f"\nwritten: {config.out / 'accuracy.jsonl'}, {config.out / 'accuracy.md'}, {config.picture}")


INTRODUCTION = """# Accuracy against float64

Made by `python -m experiments.bench.accuracy` with {versions}; x of shape {shape}.

Largest error over all channels: of the mean in standard deviations, of the variance relative to var + ε, of y absolute,
of dx relative to its largest value; y and dx of half-precision input include rounding to half precision where the
implementation returns it. "first" is the first training step (running mean 0), "steady" has a running mean within 0.01
of the batch's. A variance error of 1 means that nothing is left of it.

"""


def _document(rows: list[dict[str, Any]]) -> str:
    made = ", ".join(f"{name} {version}" for name, version in versions().items())
    return INTRODUCTION.format(versions=made, shape=SHAPE) + table(rows) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
