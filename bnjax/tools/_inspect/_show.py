"""The table of an inspection as text, for rich, and as a picture."""

import importlib
from collections.abc import Sequence
from pathlib import Path as File
from typing import Any

Row = dict[str, Any]

_COLUMNS = (  # key, heading
    ("layer", "layer"),
    ("channels", "channels"),
    ("rows", "rows"),
    ("mean_drift", "mean drift"),
    ("var_drift", "var drift"),
    ("replica_divergence", "replicas"),
    ("constant", "constant"),
    ("dead", "dead"),
    ("skipped", "skipped"),
    ("mean_over_std", "|mean|/std"),
    ("var_min", "var min"),
    ("var_max", "var max"),
    ("scale_min", "scale min"),
    ("scale_median", "median"),
    ("scale_max", "max"),
)


def as_text(rows: Sequence[Row]) -> str:
    """Returns aligned columns, those that hold something; then the flags."""
    columns = _filled(rows)
    cells = [[heading for _, heading in columns], *([_cell(row[key]) for key, _ in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    ]
    return "\n".join([line.rstrip() for line in lines] + [f"! {who}: {flag}" for who, flag in _flags(rows)])


def _flags(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Returns each sentence once, after the layers that it is about."""
    about: dict[str, list[str]] = {}
    for row in rows:
        for flag in row["flags"]:
            about.setdefault(flag, []).append(row["layer"])
    every = f"all {len(rows)} layers"
    return [(every if len(layers) == len(rows) > 1 else ", ".join(layers), flag) for flag, layers in about.items()]


def as_rich(rows: Sequence[Row]) -> Any:
    """Returns a `rich.console.Group` of the table and the flags."""
    console, table, text = (_needs("rich", f"rich.{name}") for name in ("console", "table", "text"))
    columns = _filled(rows)
    grid = table.Table()
    for key, heading in columns:
        grid.add_column(heading, justify="left" if key == "layer" else "right")
    for row in rows:
        style = "yellow" if row["flags"] else None
        grid.add_row(*[text.Text(_cell(row[key])) for key, _ in columns], style=style)
    flags = [text.Text(f"{who}: {flag}", style="yellow") for who, flag in _flags(rows)]
    return console.Group(grid, *flags)


def draw(rows: Sequence[Row], file: File) -> None:
    """Draws four panels over the layers: drift, scales, variances, idle channels."""
    figure = _needs("matplotlib", "matplotlib.figure").Figure(figsize=(12, 2.5 + 0.5 * len(rows)), layout="constrained")
    drift, scales, variances, idle = figure.subplots(1, 4, sharey=True)
    names, places = [row["layer"] for row in rows], range(len(rows))
    drift.set_yticks(places, names)
    drift.invert_yaxis()
    _bars(drift, rows, ("mean_drift", "var_drift"), ("mean (standard deviations)", "variance (nepers)"))
    drift.set_title("Batch against\nrunning statistics")
    _ranges(scales, rows, "scale_min", "scale_max", "scale_median")
    scales.set_title("|scale|: smallest,\nmedian, largest")
    _ranges(variances, rows, "var_min", "var_max", None)
    variances.set_title("Running variance:\nsmallest, largest")
    _bars(idle, rows, ("constant", "dead"), ("constant input", "scale next to zero"), share="channels")
    idle.set_title("Idle channels\n(share)")
    figure.savefig(file, dpi=120)


def _bars(axes: Any, rows: Sequence[Row], keys: tuple[str, str], labels: tuple[str, str], share: str = "") -> None:
    for i, (key, label) in enumerate(zip(keys, labels, strict=True)):
        at = [(place, row) for place, row in enumerate(rows) if row[key] is not None]
        lengths = [row[key] / (row[share] if share else 1) for _, row in at]
        axes.barh([place + 0.4 * i - 0.2 for place, _ in at], lengths, height=0.35, label=label)
    axes.set_xlim(left=0)
    axes.legend(fontsize="small")


def _ranges(axes: Any, rows: Sequence[Row], low: str, high: str, middle: str | None) -> None:
    at = [(place, row) for place, row in enumerate(rows) if row[low] is not None]
    axes.hlines([place for place, _ in at], [row[low] for _, row in at], [row[high] for _, row in at])
    for key in (low, high, *([middle] if middle else [])):
        axes.plot([row[key] for _, row in at], [place for place, _ in at], "|" if key != middle else "o")
    if max((row[high] for _, row in at), default=0) > 100 * min((row[low] for _, row in at), default=0):
        axes.set_xscale("symlog", linthresh=1e-6)  # within two decades its axis would have next to no numbers


def _filled(rows: Sequence[Row]) -> list[tuple[str, str]]:
    return [(key, heading) for key, heading in _COLUMNS if any(row[key] is not None for row in rows)]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _needs(package: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'this needs {package}, which is not installed: pip install "bnjax[experiments]".') from error
