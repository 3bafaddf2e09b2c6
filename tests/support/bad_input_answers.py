"""Computes the right answer of a layer to a row of bad_inputs.py: y and running averages, in NumPy float64."""

import numpy as np

from tests.support import oracle


def seen(x, x64=False):
    """Returns x as the layer sees it: rounded to float32 without x64, then widened to float64 (or complex128)."""
    x = np.asarray(x)
    if np.iscomplexobj(x):
        return (x if x64 else x.astype(np.complex64)).astype(np.complex128)
    keeps = x64 and x.dtype == np.float64
    return (x if keeps else x.astype(np.float32)).astype(np.float64)


def statistics(x, features, mask):
    """Computes the oracle's statistics; of complex x a complex mean, and the variance E|x − mean|²."""
    if not np.iscomplexobj(x):
        return oracle.statistics(x, features, mask)
    real, imag = (oracle.statistics(part, features, mask) for part in (x.real, x.imag))
    return oracle.Statistics(real.mean + 1j * imag.mean, real.var + imag.var, real.count)


@np.errstate(all="ignore")
def answer(case):
    """Returns the right y, mean and var as a dict, with NaN where NaN is right."""
    x = seen(case.x(), case.x64)
    mask = _mask(case)
    axes = (case.axis,) if isinstance(case.axis, int) else case.axis
    features = tuple(sorted(a % x.ndim for a in axes))
    held = {k: np.asarray(v, np.float64) for k, v in case.variables.items()}
    if not case.train:
        y = _normalised(case, _readable(x, mask, held["mean"], features), held["mean"], held["var"], features)
        return dict(y=_nan_at(y, case.nan, features), mean=held["mean"], var=held["var"])
    batch = statistics(x, features, mask)
    y = _normalised(case, _readable(x, mask, batch.mean, features), batch.mean, batch.var, features)
    y = _nan_at(y, case.nan, features)
    # moments that overflow float32 or are not finite leave the running averages unchanged
    var = np.where(batch.var <= np.finfo(np.float64 if case.x64 else np.float32).max, batch.var, np.nan)
    var[list(case.nan)] = np.nan
    mean, var = oracle.update_running((held["mean"], held["var"]), batch._replace(var=var), float(case.momentum))
    return dict(y=y, mean=mean, var=var)


def _mask(case):
    """Returns the weights as float64; evaluation only uses where they are zero."""
    return None if case.mask is None else np.asarray(case.mask, np.float64)


def _normalised(case, x, mean, var, features):
    held = case.variables
    rows = oracle.rows_of(x, features)
    mean, var = np.expand_dims(mean, rows), np.expand_dims(var, rows)
    y = (x - mean) / np.sqrt(var + float(case.epsilon))
    if case.affine:
        y = y * np.expand_dims(held["scale"].astype(np.float64), rows) + np.expand_dims(held["bias"], rows)
    return y


def _readable(x, mask, mean, features):
    """Replaces NaN and Inf at weight zero by the mean."""
    if mask is None:
        return x
    lost = ~(np.broadcast_to(mask, x.shape) > 0) & ~np.isfinite(x)
    return np.where(lost, np.expand_dims(mean, oracle.rows_of(x, features)), x)


def _nan_at(y, channels, features):
    if not channels:
        return y
    y = np.moveaxis(y, features[0], -1).copy()
    y[..., list(channels)] = np.nan
    return np.moveaxis(y, -1, features[0])


def _unit(dtype):
    import jax.numpy as jnp

    return float(jnp.finfo(dtype).eps) / 2


def errors(got, want, case):
    """Describes what is wrong with each of y, mean and var; empty if all is right.

    y may be off by 1e-5, the bound of the design, plus the rounding to its dtype; by 1e-3 in channels that are nearly
    constant. The running averages may be off by 1e-5 of the standard deviation and of the value.
    """
    wrong = {}
    for name, value in want.items():
        if name not in got:
            continue
        actual = np.asarray(got[name])
        rounding = 2 * _unit(actual.dtype) if name == "y" and actual.dtype.itemsize < 4 else 0
        wide = np.complex128 if np.iscomplexobj(actual) or np.iscomplexobj(value) else np.float64
        problem = _compare(actual.astype(wide), np.asarray(value, wide), 1e-5, rounding, floor=_floor(case, name))
        if problem:
            wrong[name] = problem
    return wrong


@np.errstate(all="ignore")
def _floor(case, name):
    """Returns the allowed absolute error, which counts near zero, where a relative one allows nothing."""
    x = seen(case.x(), case.x64)
    if name == "y":
        features = (case.axis,) if isinstance(case.axis, int) else case.axis
        is_constant = case.train and np.any(statistics(x, features, _mask(case)).var < float(case.epsilon) / 10)
        return 1e-3 if is_constant else 1e-5
    spread = min(np.abs(x).max(initial=0, where=np.isfinite(x)), 1e38)
    return 1e-5 * spread * (1 if name == "mean" else 1e-6 * min(spread, 1e18)) + 1e-5


def _compare(actual, wanted, relative, rounding, floor):
    if actual.shape != wanted.shape:
        return f"shape {actual.shape} for {wanted.shape}"
    if np.any(np.isnan(actual) & ~np.isnan(wanted)):
        return "NaN"
    if np.any(~np.isnan(actual) & np.isnan(wanted)):
        return "a number where NaN is right"
    if np.any(~np.isfinite(actual) & np.isfinite(wanted)):
        return "Inf"
    usual = np.isfinite(wanted)
    if not np.array_equal(actual[~usual], wanted[~usual], equal_nan=True):
        return "Inf"
    off = np.abs(actual[usual] - wanted[usual])
    allowed = floor + (relative + rounding) * np.abs(wanted[usual])
    if np.all(off <= allowed):
        return ""
    return f"off by {np.max(off) / max(1, np.max(np.abs(wanted[usual]))):.1g}"
