"""What is wrong with a layer, in words, and what to do about it."""

from collections.abc import Mapping
from math import sqrt
from typing import Any

# The batch variance of n rows is off by √(2/n), relatively: by a quarter at 32 rows.
_FEW_ROWS = 32
# Drift that the sampling of the batch does not explain (three times its spread), beyond what hardly moves an accuracy.
_DRIFT = 0.2
# Replicas that saw the same batches agree to rounding; so does this.
_DIVERGED = 1e-3
# Within one layer scales of this ratio leave some channels out of every gradient step.
_SPREAD = 1e3


def flags_of(row: Mapping[str, Any]) -> list[str]:
    """Returns a sentence for each thing that is wrong."""
    if row["broken"]:  # nothing else in the row means anything then
        return [
            f"{row['broken']} of {row['channels']} channels have statistics that are not finite, or a negative "
            "variance: reset_stats() and recalibrate(), after looking for the batch that did it."
        ]
    if row["untouched"]:
        return [
            "mean is 0 and var is 1 everywhere: the statistics were never updated; train with "
            "use_running_average=False and keep the updated batch_stats, or recalibrate()."
        ]
    checks = (_constant, _dead, _skipped, _one_row, _rows, _drift, _replicas, _scales)
    return [flag for check in checks if (flag := check(row))]


def _constant(row: Mapping[str, Any]) -> str:
    if not row["constant"]:
        return ""
    return (
        f"{row['constant']} of {row['channels']} channels are constant (their input does not vary): it is dead; "
        "look at the layer before."
    )


def _dead(row: Mapping[str, Any]) -> str:
    if not row["dead"]:
        return ""
    if row["dead"] == row["channels"]:
        return (
            "the scale is zero in every channel: right at the end of a residual branch that starts as zero, else the "
            "layer passes nothing on."
        )
    return (
        f"{row['dead']} of {row['channels']} channels have a scale next to zero: prune them, or take the scale out of "
        "weight decay with decay_mask()."
    )


def _skipped(row: Mapping[str, Any]) -> str:
    if not row["skipped"]:
        return ""
    return (
        f"{row['skipped']} batches held NaN or Inf in some channel and left its running statistics alone, or had one "
        "row for it and left its variance alone: look at the data, the learning rate, the loss scale and the number of "
        "rows; reset_stats() starts the count again."
    )


def _one_row(row: Mapping[str, Any]) -> str:
    if not row["var_untouched"]:
        return ""
    return (
        "the mean was updated and the variance is still 1 everywhere: no batch had two rows per channel; use larger "
        "batches, pool over devices with axis_name, or recalibrate()."
    )


def _rows(row: Mapping[str, Any]) -> str:
    if row["rows"] is None or row["rows"] >= _FEW_ROWS:
        return ""
    if row["rows"] < 2:
        return "there is less than two rows per channel: no variance to speak of; use larger batches or layer norm."
    return (
        f"there are {row['rows']:g} rows per channel: the batch variance is off by {sqrt(2 / row['rows']):.0%}; use "
        "larger batches, pool over devices with axis_name, or normalise by groups."
    )


def _drift(row: Mapping[str, Any]) -> str:
    if row["mean_drift"] is None or row["rows"] == 0:
        return ""
    mean, var = row["mean_drift"], row["var_drift"]
    if mean <= _DRIFT + 3 / sqrt(row["rows"]) and var <= _DRIFT + 3 * sqrt(2 / row["rows"]):
        return ""
    return (
        f"the running statistics are {mean:.2g} standard deviations (mean) and {var:.2g} nepers (variance) away from "
        "the batch's: recalibrate(), lower momentum, or look for a difference between training and evaluation data."
    )


def _replicas(row: Mapping[str, Any]) -> str:
    if row["replica_divergence"] is None or row["replica_divergence"] <= _DIVERGED:
        return ""
    return (
        f"replicas hold different statistics ({row['replica_divergence']:.2g} standard deviations apart): give the "
        "layer its axis_name, and repair what is stored with merge_stats()."
    )


def _scales(row: Mapping[str, Any]) -> str:
    if row["scale_min"] is None or row["dead"] or row["scale_max"] <= _SPREAD * row["scale_min"]:
        return ""
    return f"scales range from {row['scale_min']:.2g} to {row['scale_max']:.2g}: look at the learning rate and decay."
