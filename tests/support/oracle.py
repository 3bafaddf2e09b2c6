"""Computes batch normalization in NumPy float64, from the paper's formulas and independently of the library.

Weights w default to 1. Every function takes whole (unsharded) arrays, and the feature axes as a tuple.
"""

from typing import NamedTuple

import numpy as np


class Statistics(NamedTuple):
    mean: np.ndarray  # [C]
    var: np.ndarray  # [C]
    count: np.ndarray  # [C]


class Result(NamedTuple):
    y: np.ndarray
    statistics: Statistics
    dx: np.ndarray
    dscale: np.ndarray
    dbias: np.ndarray


def rows_of(x, features):
    return tuple(a for a in range(x.ndim) if a not in {f % x.ndim for f in features})


def _weights(x, mask):
    w = np.ones(x.shape) if mask is None else np.broadcast_to(np.asarray(mask, np.float64), x.shape)
    return w, np.where(w > 0, np.asarray(x, np.float64), 0)


def statistics(x, features, mask=None):
    """Computes W = Σw, mean = Σwx / W, var = Σw(x − mean)² / W; an empty channel has mean 0 and var 0."""
    rows = rows_of(x, features)
    w, x = _weights(x, mask)
    count = w.sum(rows)
    n = np.where(count > 0, count, 1)
    mean = (w * x).sum(rows) / n
    deviation = x - np.expand_dims(mean, rows)
    return Statistics(mean, (w * deviation**2).sum(rows) / n, count)


def batch_norm(x, scale, bias, dy, features, epsilon=1e-5, mask=None):
    """Computes y and, for a cotangent dy, the derivatives.

    With dxhat = dy·scale: dx_j = rstd·dxhat_j − w_j·rstd/W·(Σ dxhat + xhat_j Σ dxhat·xhat), with sums over every
    position that has an output. A non-finite x at weight zero is read as the mean: its output is the bias and depends
    on nothing else.
    """
    rows = rows_of(x, features)
    w, _ = _weights(x, mask)
    s = statistics(x, features, mask)
    x = np.asarray(x, np.float64)
    lost = (w == 0) & ~np.isfinite(x)
    mean, rstd, n = (np.expand_dims(v, rows) for v in (s.mean, (s.var + epsilon) ** -0.5, np.maximum(s.count, 1e-300)))
    xhat = np.where(lost, 0, (np.where(lost, 0, x) - mean) * rstd)
    scale, bias = (
        np.expand_dims(np.asarray(scale, np.float64), rows),
        np.expand_dims(np.asarray(bias, np.float64), rows),
    )
    dy = np.asarray(dy, np.float64)
    dxhat = np.where(lost, 0, dy * scale)
    pull = dxhat.sum(rows, keepdims=True) + xhat * (dxhat * xhat).sum(rows, keepdims=True)
    dx = np.where(lost, 0, rstd * dxhat - w * rstd / n * pull)
    return Result(xhat * scale + bias, s, dx, (dy * xhat).sum(rows), dy.sum(rows))


def normalize(x, mean, var, scale, bias, features, epsilon=1e-5):
    rows = rows_of(x, features)
    mean, var, scale, bias = (np.expand_dims(np.asarray(v, np.float64), rows) for v in (mean, var, scale, bias))
    return (np.asarray(x, np.float64) - mean) / np.sqrt(var + epsilon) * scale + bias


def update_running(old, s, momentum):
    """Computes the new running mean and var.

    Channels without rows or with non-finite moments keep both, and channels with one row keep var. A count of at most 1
    means one row, and not a sum of fractional weights, if the variance is only rounding.
    """
    keep = (s.count == 0) | ~np.isfinite(s.mean) | ~np.isfinite(s.var)
    one_row = (s.count <= 1) & (s.var <= 2.0**-22 * np.abs(s.mean) ** 2)
    step = lambda keep, old, new: np.where(keep, old, momentum * old + (1 - momentum) * new)  # noqa: E731
    return step(keep, old[0], s.mean), step(keep | one_row, old[1], s.var)
