"""What the modules of every framework do besides keeping variables, and no user calls."""

from typing import Any

import jax

from bnjax.functional._axes import as_array, layout_of
from bnjax.functional._axes import as_flag as as_flag
from bnjax.functional._axes import check_stored as check_stored
from bnjax.functional._axes import output_dtype as output_dtype
from bnjax.functional._one_row import silent_if as silent_if


def prepare(x: Any, axis: Any) -> tuple[jax.Array, tuple[int, ...]]:
    """Returns x as an array, and the shape of its feature axes; raises for what is neither."""
    x = as_array("x", x)
    return x, layout_of(x, axis).shape


def choose(
    name: str, own: jax.Array | None, given: jax.Array | None, shape: tuple[int, ...], x: jax.Array
) -> jax.Array | None:
    """Returns the parameter of a layer, checked to have its shape, or the argument of the call in its place.

    Raises ValueError where both are there, for the parameter would have no effect.
    """
    check_stored(shape, x, **{name: own})
    if own is not None and given is not None:
        raise ValueError(
            f"{name} was given at the call, and the layer has one of its own, which would have no effect: "
            f"construct the layer with use_{name}=False."
        )
    return own if given is None else given
