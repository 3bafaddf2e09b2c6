"""Draws loss, accuracy and the drift of every normalization layer of a run, from its JSON lines alone.

`python -m experiments.train.plots METRICS.jsonl CURVES.png` draws them again.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import jsonl

SMOOTHING = 1 / 40  # window of the moving average, as a fraction of the run
LEGEND = 6  # layers that a legend can name


def draw(lines: list[jsonl.Line], png: Path) -> None:
    """Draws the curves of a run from its metrics, and writes them to `png`."""
    train, test = ([line for line in lines if line["kind"] == kind] for kind in ("train", "eval"))
    figure = Figure(figsize=(11, 7), layout="constrained")
    (loss, accuracy), (mean, var) = figure.subplots(2, 2, sharex=True)
    draw_metric(loss, train, test, "loss", "Cross-entropy")
    loss.set_yscale("log")
    draw_metric(accuracy, train, test, "accuracy", "Accuracy")
    typical = np.median(values(test, "accuracy")) if test else 0
    accuracy.set_ylim(np.floor(10 * typical) / 10, 1.005)  # the first steps may be below the axis
    draw_drift(mean, train, "mean", "Batch mean against running mean", "RMS distance (standard deviations)")
    draw_drift(var, train, "var", "Batch variance against running variance", "RMS log ratio")
    for axes in (mean, var):
        axes.set_xlabel("Training step")
    figure.suptitle(title(lines))
    figure.savefig(png, dpi=120)


def title(lines: list[jsonl.Line]) -> str:
    """Returns the title of the figure: data, batch size and devices."""
    training, hardware = lines[0]["config"]["training"], lines[0]["hardware"]
    return f"{training['data']}, batch {training['batch_size']}, {hardware['devices']} × {hardware['device_kind']}"


def draw_metric(axes: Axes, train: list[jsonl.Line], test: list[jsonl.Line], name: str, label: str) -> None:
    """Draws the smoothed training curve of a metric, and its test values as points."""
    draw_smooth(axes, steps(train), values(train, name), "training batches, moving average", "C0")
    axes.plot(steps(test), values(test, name), "o-", color="C1", markersize=3.5, label="test images, running averages")
    finish(axes, label, label)


def draw_drift(axes: Axes, train: list[jsonl.Line], moment: str, heading: str, label: str) -> None:
    """Draws one curve per layer; for deep networks from dark to bright, and only three of them are in the legend."""
    layers = sorted(train[0].get("drift", ()) if train else (), key=in_order)
    deep = len(layers) > LEGEND
    named = {layers[0], layers[len(layers) // 2], layers[-1]} if deep else set(layers)
    for index, layer in enumerate(layers):
        drift = np.array([line["drift"][layer][moment] for line in train], float)
        color = colormaps["viridis"](index / (len(layers) - 1)) if deep else f"C{index}"
        draw_smooth(axes, steps(train), drift, layer if layer in named else None, color)
    axes.set_yscale("log")
    finish(axes, heading, label)


def in_order(layer: str) -> list[str | int]:
    """Returns a sort key that orders layers by number: BatchNorm_2 before BatchNorm_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", layer)]


def finish(axes: Axes, heading: str, label: str) -> None:
    """Sets title, unit and grid of the axes and, if they have curves, the legend, where there are usually none.

    Its place is fixed: matplotlib's search for the best one warns, where it takes long on a busy machine.
    """
    axes.set_title(heading)
    axes.set_ylabel(label)
    axes.grid(alpha=0.25)
    if axes.has_data():
        axes.legend(frameon=False, loc="lower right" if heading == "Accuracy" else "upper right")


def draw_smooth(axes: Axes, x: np.ndarray, y: np.ndarray, label: str | None, color: Any) -> None:
    """Draws the moving average of `y`, with `y` itself faint behind it."""
    if not len(y):
        return
    window = max(1, round(SMOOTHING * len(y)))
    smooth = np.convolve(y, np.full(window, 1 / window), mode="valid")
    axes.plot(x, y, color=color, alpha=0.15, linewidth=0.7)
    axes.plot(x[window - 1 :], smooth, color=color, label=label)


def steps(lines: list[jsonl.Line]) -> np.ndarray:
    """Returns the step numbers of the records."""
    return np.array([line["step"] for line in lines])


def values(lines: list[jsonl.Line], name: str) -> np.ndarray:
    """Returns the values of one metric; null becomes NaN."""
    return np.array([line[name] for line in lines], float)


def main(metrics: tyro.conf.Positional[Path], curves: tyro.conf.Positional[Path]) -> None:
    """Draws the curves of a run again.

    Args:
        metrics: JSON lines of a run, metrics.jsonl.
        curves: the picture to write.
    """
    draw(jsonl.read(metrics), curves)


if __name__ == "__main__":
    tyro.cli(main)
