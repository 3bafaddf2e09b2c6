"""Provides what the modules of linen and nnx need besides the public functions: checks of inputs and parameters."""

from typing import Any

import jax

from bnjax.functional._axes import as_array, layout_of
from bnjax.functional._axes import as_flag as as_flag
from bnjax.functional._axes import check_stored as check_stored
from bnjax.functional._axes import output_dtype as output_dtype
from bnjax.functional._one_row import silent_if as silent_if


def prepare(x: Any, axis: Any) -> tuple[jax.Array, tuple[int, ...]]:
    """Returns x as an array, and its feature shape; raises if x holds no numbers or does not have the axes `axis`."""
    x = as_array("x", x)
    return x, layout_of(x, axis).shape


def choose(
    name: str, own: jax.Array | None, given: jax.Array | None, shape: tuple[int, ...], x: jax.Array
) -> jax.Array | None:
    """Returns the scale or bias to use: the parameter of the layer, or the argument of the call, or None.

    Args:
      name: scale or bias, for the error.
      own: the parameter of the layer, or None.
      given: the argument of the call, or None.
      shape: that the parameter must have.
      x: the input, for the error.

    Raises:
      ValueError: both are there, so that the parameter would have no effect; or the parameter has another shape.
    """
    check_stored(shape, x, **{name: own})
    if own is not None and given is not None:
        raise ValueError(
            f"{name} was given at the call, and the layer has one of its own, which would have no effect: "
            f"construct the layer with use_{name}=False."
        )
    return own if given is None else given
