r"""Channels that put out next to nothing, and whether their input or their scale is the reason."""

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

# A standard deviation that is thousands of times smaller than the 1 that a layer starts with passes nothing on; scales
# that were decayed reach 1e-6 and less.
_NOTHING = 1e-3


def idle(
    mean: Array, var: Array, scale: Array | None, bias: Array | None, epsilon: float, unit: float
) -> tuple[Array, Array]:
    """Returns the channels whose input does not vary, and those others whose scale leaves nothing of it.

    Args:
      mean, var: the running averages.
      scale, bias: of the layer; None for 1 and 0.
      epsilon: of the layer.
      unit: the relative spacing of the numbers that the layer computes with.

    Returns:
      Two arrays of bool, of the shape of the statistics.
    """
    var = np.maximum(var, np.finfo(np.float64).tiny, dtype=np.float64)
    standardised = 1 / np.sqrt(1 + epsilon / var)  # the standard deviation of xhat; 1 where var is infinite
    put_out = standardised * (1 if scale is None else scale)
    rounded = np.sqrt(var) <= unit * np.abs(mean)
    lost = put_out <= unit * (0 if bias is None else np.abs(bias))
    constant = rounded | ((put_out < _NOTHING) & (standardised < _NOTHING))
    return constant, ((put_out < _NOTHING) | lost) & ~constant
