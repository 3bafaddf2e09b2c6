"""Makes the table and the picture of what was measured on an accelerator."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.bench import report

Row = dict[str, Any]

# Bytes per second of main memory, by a part of the name that JAX gives the device. GPUs: NVIDIA's data sheets of H100
# and H200 (SXM) and A100 (SXM4); TPU: https://docs.cloud.google.com/tpu/docs/v5e. Others have no share of a peak.
PEAKS = {
    "H100 80GB HBM3": 3.35e12,
    "H200": 4.8e12,
    "A100-SXM4-80GB": 2.039e12,
    "A100-SXM4-40GB": 1.555e12,
    "TPU v5 lite": 0.819e12,
}


def peak_bandwidth(kind: str) -> float | None:
    """Returns the bytes per second that the memory of a device can move; None where they are not known."""
    return next((peak for name, peak in PEAKS.items() if name in kind), None)


def text(about: dict[str, str], found: Sequence[Row]) -> str:
    """Returns the page's tables."""
    tables = [f"{about['devices']} × {about['device']}."]
    if checked := [row for row in found if row["part"] == "conformance"]:
        tables.append("Largest errors against float64, of y and dx, over the largest value:\n\n" + _errors(checked))
    if times := [row for row in found if row["part"] != "conformance"]:
        clocks = " and ".join(sorted({row["clock"] for row in times}))
        tables.append(f"Times, by the clock of the {clocks}, forward and backward in bfloat16:\n\n" + _times(times))
    if (latency := all_reduce_microseconds(times)) is not None:
        tables.append(f"An all-reduce of a layer's statistics, of which each layer has two, takes {latency:.1f} µs.")
    return "\n\n".join(tables)


def all_reduce_microseconds(rows: Sequence[Row]) -> float | None:
    """Returns half of what a layer's two all-reduces add to its time; None on one device."""
    times = [row["milliseconds"] for row in rows if row["part"] == "pooling"]
    return (times[0] - times[1]) * 1e3 / 2 if times else None


def _errors(rows: Sequence[Row]) -> str:
    """Makes a table of errors: a line for each norm and dtype, a column for each mean."""
    ratios = sorted({row["mean_over_std"] for row in rows})
    lines: dict[tuple[Any, ...], dict[float, str]] = {}
    for row in rows:
        what = ", ".join(w for w in ("masked" * row["masked"], row.get("flags", "")) if w)
        key = (row["norm"], row["dtype"], what)
        lines.setdefault(key, {})[row["mean_over_std"]] = f"{row['y']:.1e}, {row['dx']:.1e}"
    head = ("norm", "dtype", "", *(f"mean/std {ratio:g}" for ratio in ratios))
    return report.table(head, [(*key, *(cells.get(ratio, "") for ratio in ratios)) for key, cells in lines.items()])


def _times(rows: Sequence[Row]) -> str:
    """Makes a table of times: a line for each program and norm."""
    unit = {row["part"]: row["milliseconds"] for row in rows if row["norm"] in ("bnjax", "of each device")}
    lines = [
        (
            row["part"],
            row["norm"],
            f"{row['milliseconds']:.3f}",
            f"{row['milliseconds'] / unit[row['part']]:.2f}",
            f"{row['gigabytes_per_second']:,.0f}" + ("" if row["of_peak"] is None else f" ({row['of_peak']:.0%})"),
            "" if row["temporary_megabytes"] is None else f"{row['temporary_megabytes']:,.1f}",
            f"{row['compile_seconds']:.1f}",
        )
        for row in rows
    ]
    head = ("program", "norm", "ms", "of bnjax's", "GB/s (of peak)", "temporary MB", "compile s")
    return report.table(head, lines)


def write(about: dict[str, str], found: Sequence[Row], out: Path) -> None:
    """Writes accelerator.jsonl, accelerator.md and accelerator.png."""
    report.keep(found, out, "accelerator", "A real accelerator", text(about, found), about)
    _draw(about, found, out / "accelerator.png")


def _draw(about: dict[str, str], found: Sequence[Row], file: Path) -> None:
    """Draws errors by the mean of the data on the left, and times in units of bnjax's on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    plain = [r for r in found if r["part"] == "conformance" and not (r["masked"] or r["dtype"] != "float32")]
    for norm in dict.fromkeys(row["norm"] for row in plain):
        own = [row for row in plain if row["norm"] == norm and "flags" not in row]
        left.plot([max(r["mean_over_std"], 1) for r in own], [max(r["y"], 1e-9) for r in own], "o-", label=norm)
    left.set(xscale="log", yscale="log", xlabel="mean / standard deviation", ylabel="largest error of y")
    left.set_title("float32, against float64")
    left.legend()
    timed = [row for row in found if row["part"] in ("layer", "small layer", "ResNet-50 step")]
    if timed:
        parts = list(dict.fromkeys(row["part"] for row in timed))
        norms = list(dict.fromkeys(row["norm"] for row in timed))
        unit = {row["part"]: row["milliseconds"] for row in timed if row["norm"] == "bnjax"}
        for i, norm in enumerate(norms):
            own = {row["part"]: row["milliseconds"] / unit[row["part"]] for row in timed if row["norm"] == norm}
            at = [parts.index(part) + (i - (len(norms) - 1) / 2) * 0.8 / len(norms) for part in own]
            right.bar(at, list(own.values()), 0.8 / len(norms), label=norm)
        right.axhline(1, color="gray", linewidth=0.8)
        right.set_xticks(range(len(parts)), parts)
        right.set(ylabel="time, of bnjax's", title="forward and backward, bfloat16")
        right.legend(loc="upper left", bbox_to_anchor=(1, 1))
    else:
        right.set_visible(False)
    figure.suptitle(f"{about['devices']} × {about['device']}, jax {about['jax']}")
    figure.savefig(file, dpi=120)
