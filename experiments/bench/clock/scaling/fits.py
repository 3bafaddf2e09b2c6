"""Fits slopes to the lines of `experiments.bench.clock.scaling`, as tables and as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench import report

SWEEPS = {  # name: (what grows, which curves)
    "64 channels": ("rows", ("floor", "bnjax", "flax.linen")),
    "8 channels": ("rows", ("floor", "bnjax", "flax.linen")),
    "elements fixed": ("channels", ("floor", "bnjax", "flax.linen")),
    "simulated devices": ("devices", ("local", "pooled")),
    "2 processes": ("payload, bytes", ("all-reduce", "local", "pooled")),
    "4 processes": ("payload, bytes", ("all-reduce", "local", "pooled")),
}
POWERS, GLOO = tuple(SWEEPS)[:3], tuple(SWEEPS)[4:]
COLOURS = {"floor": "black", "bnjax": "C0", "pooled": "C0", "flax.linen": "C1", "local": "C2", "all-reduce": "C3"}
SIZES = {"full": "Measured", "quick": "Few and small sizes, which show that the program runs and no more"}
LARGE = 8_000_000  # bytes: smaller arrays fit in caches, and the smallest measure the overhead of a call
BYTES_PER_CHANNEL = 2 * 4  # of an all-reduce: two sums in float32
Row = dict[str, Any]
Points = list[tuple[float, float]]


def points(rows: Sequence[Row], sweep: str, curve: str, *, least: int = 0) -> Points:
    """Returns (size, milliseconds) of a curve, for activations of at least `least` bytes."""
    found = [r for r in rows if (r["sweep"], r["curve"]) == (sweep, curve) and r["bytes"] >= least]
    return sorted((r["grows"], r["milliseconds"]) for r in found)


def power(found: Points) -> tuple[float, float]:
    """Fits y = factor · x^exponent by least squares on logarithms; returns (exponent, factor)."""
    x, y = np.log(np.array(found)).T
    exponent, factor = np.polyfit(x, y, 1)
    return float(exponent), float(np.exp(factor))


def line(found: Points) -> tuple[float, float]:
    """Fits y = latency + slope · x by least squares of relative errors, because y spans decades; returns (latency,
    slope).
    """
    x, y = np.array(found).T
    slope, latency = np.polyfit(x, y, 1, w=1 / y)
    return float(latency), float(slope)


def _per_kilobyte(fit: tuple[float, float]) -> str:
    """Formats a slope in µs per kB, or "not seen" if waiting for a core hides it."""
    return f"{fit[1] * 1e6:.2f}" if fit[1] > 0 else "not seen"


def tables(lines: Sequence[Row]) -> str:
    """Makes Markdown tables: exponents, the cost of pooling over simulated devices, and over real processes."""
    about, *rows = lines
    made = f"{SIZES[about['sizes']]}: jax {about['jax']}, flax {about['flax']}, {about['cores']} cores."
    return "\n\n".join((_exponents(rows), _devices(rows), _processes(rows), made))


def _exponents(rows: Sequence[Row]) -> str:
    """Makes a table of the exponents of time in rows and in channels."""
    curves = SWEEPS[POWERS[0]][1]
    lines = [
        (f"{SWEEPS[sweep][0]}, {sweep}", *(f"{power(points(rows, sweep, c, least=LARGE))[0]:.2f}" for c in curves))
        for sweep in POWERS
    ]
    return report.table(("exponent of the time in", *curves), lines)


def _devices(rows: Sequence[Row]) -> str:
    """Makes a table of times over simulated devices, with local and with pooled statistics."""
    local, pooled = (dict(points(rows, "simulated devices", curve)) for curve in ("local", "pooled"))
    lines = [
        ("statistics of each device, ms", *(f"{t:.2f}" for t in local.values())),
        ("pooled over all, ms", *(f"{t:.2f}" for t in pooled.values())),
        ("difference, µs", *(f"{(pooled[d] - local[d]) * 1e3:.0f}" for d in local)),
    ]
    return report.table(("simulated devices", *local), lines)


def _processes(rows: Sequence[Row]) -> str:
    """Makes a table of all-reduce and layer times over real processes."""
    fits = [line(points(rows, sweep, "all-reduce")) for sweep in GLOO]
    lines = [
        ("one all-reduce: latency, µs", *(f"{latency * 1e3:.0f}" for latency, _ in fits)),
        ("one all-reduce: µs per kB more", *map(_per_kilobyte, fits)),
    ]
    for curve in ("local", "pooled"):
        found = [points(rows, sweep, curve) for sweep in GLOO]
        for end in (0, -1):
            channels = int(found[0][end][0]) // BYTES_PER_CHANNEL
            lines.append((f"a layer of {channels} channels, {curve}: µs", *(f"{f[end][1] * 1e3:.0f}" for f in found)))
    return report.table(("over gloo", *GLOO), lines)


def draw(lines: Sequence[Row], file: Path) -> None:
    """Draws a log-log panel for each sweep, with the fits in the legends."""
    from matplotlib.figure import Figure

    rows = lines[1:]
    figure = Figure(figsize=(14, 7.5), layout="constrained")
    for axes, (sweep, (grows, curves)) in zip(figure.subplots(2, 3).flat, SWEEPS.items(), strict=True):
        for curve in curves:
            style = dict(lw=2.5, zorder=3) if curve in ("bnjax", "pooled") else dict(lw=1, alpha=0.8)
            label = curve + _fit(rows, sweep, curve)
            x, y = zip(*points(rows, sweep, curve), strict=True)
            axes.plot(x, y, "o-", ms=4, color=COLOURS[curve], label=label, **style)
        axes.set_xscale("log", base=2 if sweep == "simulated devices" else 10)
        axes.set(yscale="log", xlabel=grows, ylabel="milliseconds", title=sweep)
        axes.legend(fontsize="small")
    figure.savefig(file, dpi=100)


def _fit(rows: Sequence[Row], sweep: str, curve: str) -> str:
    """Returns the fit of a curve as text for the legend, or an empty string."""
    if sweep in POWERS:
        return f", ∝ x^{power(points(rows, sweep, curve, least=LARGE))[0]:.2f}"
    if curve == "all-reduce":
        latency, slope = line(points(rows, sweep, curve))
        return f", {latency * 1e3:.0f} µs" + (f" + {slope * 1e6:.2f} µs/kB" if slope > 0 else "")
    return ""
