"""Provides what the modules of linen and nnx need besides the public functions: checks of inputs and parameters."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

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


class _Around(threading.local):
    """What a context around the calls of this thread gives to the layers that it meets."""

    mask: Any = None
    asked = 0  # how many layers have asked for it


_around = _Around()


@contextmanager
def masking(mask: Any) -> Iterator[None]:
    """Lets layers that are given no mask find this one; whoever opens it keeps apart what jit traces within it."""
    before, _around.mask = _around.mask, mask
    try:
        yield
    finally:
        _around.mask = before


def times_asked() -> int:
    """Returns how often a layer of this thread has asked for the mask around it."""
    return _around.asked


def mask_around(x: jax.Array, own: Any = None) -> Any:
    """Returns the mask of a call: its own, or that of the context around it, or None."""
    if _around.mask is None:
        return own
    _around.asked += 1
    return fitted(_around.mask, x) if own is None else own


def fitted(mask: jax.Array | Callable[[jax.Array], Any], x: jax.Array) -> Any:
    """Returns the mask of x: what a function makes of x, or an array of the first axes of x with axes of 1 behind.

    Raises:
      ValueError: the axes of the array are not the first ones of x.
    """
    if callable(mask):
        return mask(x)
    mask = mask if isinstance(mask, jax.Array) else np.asarray(mask)
    shape = mask.shape + (1,) * (x.ndim - mask.ndim)
    if len(shape) > x.ndim or shape[-1] != 1 or any(m not in (1, n) for m, n in zip(shape, x.shape, strict=True)):
        raise ValueError(
            f"the mask {list(mask.shape)} does not have the first axes of the x {list(x.shape)} of a layer, such as "
            f"{list(x.shape[:1])} for its rows. Where layers meet other sizes, pass a function from x to its mask."
        )
    return mask.reshape(shape)
