"""Measures errors of mean, variance, y and dx against float64 as the data moves away from zero, in every library.

Claim:    From the first batch on, bnjax is as accurate at a mean of 10^5 standard deviations as at zero.
Command:  python -m experiments.bench.accuracy
Hardware: 2 CPU cores
Time:     60 s
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

import bnjax
from experiments.bench import report

EPSILON = 1e-5
RATIOS = (0.0, 1.0, 1e1, 1e2, 1e3, 1e4, 1e5)  # mean/std of every channel
SHAPE = (64, 16, 16, 8)
ROWS = (0, 1, 2)
HALF_MAX = 65504.0


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the benchmark: what is measured, and where the results go."""

    out: Path = report.RESULTS
    """Folder of accuracy.jsonl and accuracy.md."""
    picture: Path = report.ROOT / "docs" / "assets" / "accuracy.png"
    """The errors of y and dx by mean/std."""
    quick: bool = False
    """Measure three ratios in float32 only, and write nothing."""
    redraw: bool = False
    """Measure nothing; draw the picture again from the committed numbers."""


class Batch(NamedTuple):
    x: np.ndarray
    dy: np.ndarray
    running_mean: np.ndarray  # [C], float32: zeros in the first step, close to the batch mean in a steady state
    running_var: np.ndarray  # [C]


class Answer(NamedTuple):
    mean: Any  # [C]
    var: Any  # [C]
    y: Any
    dx: Any


def reference(batch: Batch) -> Answer:
    """Computes mean, variance, y and dx by the textbook formulas in NumPy float64."""
    x, dy = batch.x.astype(np.float64), batch.dy.astype(np.float64)
    mean, var = x.mean(ROWS), x.var(ROWS)
    rstd = (var + EPSILON) ** -0.5
    y = (x - mean) * rstd
    return Answer(mean, var, y, rstd * (dy - dy.mean(ROWS) - y * (dy * y).mean(ROWS)))


def _answer(forward: Callable[[Any, Batch], tuple[Any, Any, Any]], batch: Batch) -> Answer:
    """Computes mean, var and y with `forward`, and the gradient of Σ y·dy, in one compiled program."""

    def loss(x: Any) -> Any:
        mean, var, y = forward(x, batch)
        y = y.astype(jnp.float32)
        return jnp.sum(y * batch.dy), (mean, var, y)

    dx, (mean, var, y) = jax.jit(jax.grad(loss, has_aux=True))(jnp.asarray(batch.x))
    return Answer(mean, var, y, dx)


def _linen(module: Any, x: Any, batch: Batch) -> tuple[Any, Any, Any]:
    """Applies a linen module with momentum 0, so that its new running statistics are those of the batch."""
    stats = {"mean": jnp.asarray(batch.running_mean), "var": jnp.asarray(batch.running_var)}
    y, updates = module.apply({"batch_stats": stats}, x, mutable=["batch_stats"])
    return updates["batch_stats"]["mean"], updates["batch_stats"]["var"], y


def _nnx(module: Any, x: Any, batch: Batch) -> tuple[Any, Any, Any]:
    """Applies an nnx module with momentum 0, so that its new running statistics are those of the batch."""
    plain = dict(use_running_average=False, momentum=0.0, use_scale=False, use_bias=False)
    layer = module(x.shape[-1], **plain, rngs=nnx.Rngs(0))
    layer.mean[...], layer.var[...] = jnp.asarray(batch.running_mean), jnp.asarray(batch.running_var)
    y = layer(x)
    return layer.mean[...], layer.var[...], y


def _torch(batch: Batch) -> Answer:
    """Computes with PyTorch's layer over NCHW, which is more accurate than over NHWC; undoes the n/(n − 1) of its
    variance.
    """
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
    """Returns a function `batch -> answer` for every implementation that is installed."""
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
        print("torch is not installed: it is not measured", file=sys.stderr)
    return found


def draw(dtype: str, ratio: float, step: str) -> Batch:
    """Draws a batch whose channels all have this mean/std; its running statistics are those of a first or a
    later step.
    """
    rng = np.random.default_rng(0)
    x = (rng.normal(size=SHAPE) + ratio).astype(jnp.dtype(dtype))
    mean = x.astype(np.float64).mean(ROWS) + 0.01 if step == "steady" else np.zeros(SHAPE[-1])
    ones = np.ones(SHAPE[-1], np.float32)
    return Batch(x, rng.normal(size=SHAPE).astype(np.float32), mean.astype(np.float32), ones)


def errors(got: Answer, want: Answer) -> dict[str, float]:
    """Computes the largest error of each result over all channels.

    The mean's is in standard deviations, the variance's relative to var + ε, that of y absolute (y is standardised),
    and that of dx relative to the largest |dx|.
    """
    std = np.sqrt(want.var + EPSILON)
    wide = Answer(*(np.asarray(v, np.float64) for v in got))
    return {
        "mean": float(np.max(np.abs(wide.mean - want.mean) / std)),
        "var": float(np.max(np.abs(wide.var - want.var) / (want.var + EPSILON))),
        "y": float(np.max(np.abs(wide.y - want.y))),
        "dx": float(np.max(np.abs(wide.dx - want.dx)) / np.max(np.abs(want.dx))),
    }


def measure(config: Config) -> Iterator[dict[str, Any]]:
    """Yields one row per implementation, dtype, step and ratio."""
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
    """Makes a Markdown table with one line per dtype, ratio, step and implementation."""
    lines = []
    for row in rows:
        cells = ("NaN" if np.isnan(row[c]) else f"{row[c]:.0e}" for c in COLUMNS)
        lines.append((row["dtype"], f"{row['ratio']:g}", row["step"], row["peer"], *cells))
    return report.table(("dtype", "mean/std", "step", "implementation", *COLUMNS), lines)


STYLES = {
    "bnjax": dict(color="C0", lw=2.5, zorder=3, marker="o"),
    "flax.linen, accurate": dict(color="C2", marker="s"),
    "torch": dict(color="C4", marker="^", ls="--"),
    "flax.linen": dict(color="C3", marker="D"),
}


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Draws errors of y and dx in the first step in float32; flax.nnx is left out, because it computes as flax.linen
    does.
    """
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


def main(config: Config) -> None:
    """Measures, prints, and writes rows, page and picture."""
    if config.redraw:
        return plot(report.read("accuracy"), config.picture)
    rows = report.shown(measure(config), show)
    if not config.quick:
        report.keep(rows, config.out, "accuracy", "Accuracy against float64", INTRODUCTION.format(SHAPE) + table(rows))
        plot(rows, config.picture)


def show(row: dict[str, Any]) -> str:
    """Formats a row as one line for the terminal."""
    errors = "  ".join(f"{c} {row[c]:.1e}" for c in COLUMNS)
    return f"{row['dtype']:9s} {row['ratio']:8g} {row['step']:7s} {row['peer']:21s}{errors}"


INTRODUCTION = """\
x has the shape {}.

Largest error over all channels: of the mean in standard deviations, of the variance relative to var + ε, of y absolute,
of dx relative to its largest value; y and dx of half-precision input include rounding to half precision where the
implementation returns it. "first" is the first training step (running mean 0), "steady" has a running mean within 0.01
of the batch's. A variance error of 1 means that nothing is left of it.

"""


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
