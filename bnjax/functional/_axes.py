"""Axes and shapes of batch normalization, and every error about an argument.

The rest of the package trusts what has passed through here: axes are sorted and non-negative, per-channel vectors
have exactly the feature shape (a wrong channel count is refused, never broadcast) and a mask has the rank of x.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Layout(NamedTuple):
    """Which axes of x hold the channels and which are reduced over."""

    features: tuple[int, ...]  # sorted, non-negative
    rows: tuple[int, ...]  # the others
    shape: tuple[int, ...]  # the feature shape: sizes of the feature axes

    def expand(self, vector: jax.Array) -> jax.Array:
        """A vector of the feature shape, with size-1 axes for the rows: broadcasts against x."""
        return jnp.expand_dims(vector, self.rows)


def layout_of(x: jax.Array, axis: int | Sequence[int]) -> Layout:
    """The layout of x with feature axis or axes `axis`; raises ValueError if they do not fit x."""
    axes = (axis,) if isinstance(axis, (int, np.integer)) else tuple(axis)
    if not axes:
        raise ValueError(f"axis names the feature axis or axes and must not be empty; got axis={axis!r}.")
    for a in axes:
        if not -x.ndim <= a < x.ndim:
            raise ValueError(
                f"axis must name axes of x; got axis={axis!r} for x of shape {x.shape}: "
                f"{a} is not in [{-x.ndim}, {x.ndim - 1}]. Give the axis (or axes) that holds the channels."
            )
    features = tuple(sorted(a % x.ndim for a in axes))
    if len(set(features)) != len(features):
        raise ValueError(f"axis must not repeat an axis; got axis={axis!r} for x of rank {x.ndim}.")
    rows = tuple(a for a in range(x.ndim) if a not in features)
    return Layout(features, rows, tuple(x.shape[a] for a in features))


def as_input(x: jax.Array) -> jax.Array:
    """x as a real floating-point array; integers and bools become the default float type."""
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError(f"x must be real; got dtype {x.dtype}. Normalise x.real and x.imag as two channels instead.")
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def as_vector(name: str, vector: jax.Array, layout: Layout) -> jax.Array:
    """A per-channel argument, checked to have exactly the feature shape."""
    if vector is None:
        raise ValueError(f"{name} is needed here, of shape {layout.shape}; got None.")
    vector = jnp.asarray(vector)
    if vector.shape != layout.shape:
        raise ValueError(
            f"{name} must have the shape of the feature axes {layout.features} of x, {layout.shape}; "
            f"got {vector.shape}. Nothing is broadcast here: check the channel count, or the axis argument."
        )
    if not (jnp.issubdtype(vector.dtype, jnp.floating) or jnp.issubdtype(vector.dtype, jnp.integer)):
        raise TypeError(f"{name} must be real numbers; got dtype {vector.dtype}.")
    return vector


def as_optional(name: str, vector: jax.Array | None, layout: Layout) -> jax.Array | None:
    """The same, for an argument that may be left out."""
    return None if vector is None else as_vector(name, vector, layout)


def as_mask(mask: jax.Array | None, x: jax.Array) -> jax.Array | None:
    """The mask at the rank of x, still unbroadcast (sums over it stay small)."""
    if mask is None:
        return None
    _check_weights(mask)
    mask = jnp.asarray(mask)
    shape = (1,) * (x.ndim - mask.ndim) + mask.shape
    fits = len(shape) == x.ndim and all(m in (1, n) for m, n in zip(shape, x.shape, strict=True))
    if not fits:
        raise ValueError(
            f"mask must be broadcastable to x; got mask {mask.shape} for x {x.shape}. "
            "A mask with one weight per row needs a trailing axis: mask[..., None]."
        )
    return (mask if mask.dtype == bool else jnp.where(mask > 0, mask, 0)).reshape(shape)


def _check_weights(mask: Any) -> None:
    """Refuses what is no weight. The values of a traced mask are not known: there a negative one or NaN counts as 0."""
    if jnp.issubdtype(jnp.result_type(mask), jnp.complexfloating):
        raise TypeError(f"mask must be bool, integer or floating weights; got dtype {jnp.result_type(mask)}.")
    known = not isinstance(mask, jax.core.Tracer) and getattr(mask, "is_fully_addressable", True)
    if known and not np.all(np.asarray(mask) >= 0):
        raise ValueError("mask holds weights, which must be non-negative numbers; got a negative one or NaN.")


def check_epsilon(epsilon: float) -> float:
    """epsilon as a float; raises ValueError unless it is positive and finite."""
    if isinstance(epsilon, jax.core.Tracer):
        raise ValueError("epsilon must be a Python number, known when the function is traced; got a traced value.")
    value = float(epsilon)
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(
            f"epsilon must be positive and finite, or a constant channel divides by zero; got {epsilon!r}. "
            "The usual value is 1e-5."
        )
    return value


def check_momentum(momentum: jax.Array | float) -> None:
    """Raises ValueError unless momentum, the weight of the old value, is in [0, 1] (a traced one is trusted)."""
    if not isinstance(momentum, jax.core.Tracer) and not 0 <= float(momentum) <= 1:
        raise ValueError(
            f"momentum is the weight of the OLD running value and must be in [0, 1]; got {momentum!r}. "
            "PyTorch's momentum m is the weight of the new one: pass 1 - m."
        )


def statistics_dtype(*arrays: jax.Array | None) -> np.dtype:
    """The dtype of statistics: float32 at least, float64 if any of the arrays is."""
    present = [a for a in arrays if a is not None]
    return jnp.promote_types(jnp.result_type(*present), jnp.float32)


def output_dtype(dtype: jax.typing.DTypeLike | None, *arrays: jax.Array | None) -> np.dtype:
    """`dtype`, or else the promotion of the arrays that are given (Flax's rule)."""
    if dtype is not None:
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"dtype is that of the output and must be floating; got {jnp.dtype(dtype)}.")
        return jax.dtypes.canonicalize_dtype(dtype)
    return jnp.result_type(*[a for a in arrays if a is not None])
