"""Checks the arguments of batch normalization: axes, shapes, dtypes and values; raises every error about them.

The rest of the package trusts what these functions return: axes are sorted and non-negative, per-channel vectors
have exactly the feature shape (a wrong channel count is refused, never broadcast) and a mask has the rank of x.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Layout(NamedTuple):
    """Holds which axes of x are the channels and which are reduced over."""

    features: tuple[int, ...]  # sorted, non-negative
    rows: tuple[int, ...]  # the others
    shape: tuple[int, ...]  # the feature shape: sizes of the feature axes

    def expand(self, vector: jax.Array) -> jax.Array:
        """Returns a vector of the feature shape with an axis of size 1 for each axis of rows: it broadcasts to x."""
        return jnp.expand_dims(vector, self.rows)


def layout_of(x: jax.Array, axis: int | Sequence[int]) -> Layout:
    """Returns the layout of x for the feature axis or axes `axis`; raises ValueError if x does not have them."""
    axes = tuple(axis) if isinstance(axis, (Sequence, np.ndarray)) and not isinstance(axis, str) else (axis,)
    if not all(isinstance(a, (int, np.integer)) and not isinstance(a, bool) for a in axes):
        raise TypeError(
            f"axis must be an integer or a sequence of integers, known when the call is traced; got {axis!r}."
        )
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


def as_array(name: str, a: Any) -> jax.Array:
    """Returns an argument as an array of numbers.

    float8 and dtypes of less than a byte, which JAX does not promote, are converted to float32. Raises TypeError for
    what holds no numbers (None, text, objects, dates, ragged lists, keys, shapes without values) and for a masked
    array of NumPy, whose mask JAX would drop.
    """
    problem, found = None, type(a).__name__
    if not isinstance(a, (str, bytes, jax.ShapeDtypeStruct, np.ma.MaskedArray)):
        try:
            foreign = isinstance(a, np.ndarray) and not a.dtype.isnative
            a = jnp.asarray(a.astype(a.dtype.newbyteorder("=")) if foreign else a)
            found = f"dtype {a.dtype}"
            if jnp.issubdtype(a.dtype, jnp.number) or a.dtype == bool:
                return a.astype(jnp.float32) if _is_narrow(a.dtype) else a
        except (TypeError, ValueError) as error:
            problem = error
    raise TypeError(f"{name} must be an array of numbers; got {found}. Convert it, or look for a mix-up.") from problem


def _is_narrow(dtype: np.dtype) -> bool:
    """Returns True for the dtypes that JAX does not promote: float8, and integers of less than a byte."""
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.finfo(dtype).bits < 16
    return jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).bits < 8


def _known(a: Any) -> np.ndarray[Any, Any] | None:
    """Returns the values of an argument given as Python numbers or as a NumPy array, and None for a jax.Array.

    The values of a jax.Array are not known in a trace. Outside of a trace they are not read either: a value out of
    range gives NaN in both cases, and no eager call waits for the device.
    """
    return None if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(a)) else np.asarray(a)


def as_input(x: jax.Array) -> jax.Array:
    """Returns x as a floating-point or complex array; integers and bools become float32."""
    x = as_array("x", x)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)


def as_real_input(x: jax.Array) -> jax.Array:
    """Returns x as a floating-point array, for functions that are not defined for complex x; raises TypeError there."""
    x = as_input(x)
    if jnp.iscomplexobj(x):
        raise TypeError(f"x must be real; got dtype {x.dtype}. Normalise x.real and x.imag as two channels instead.")
    return x


def as_vector(name: str, vector: jax.Array, layout: Layout, x: jax.Array | None = None) -> jax.Array:
    """Returns a per-channel argument, checked to have the feature shape; it may be complex if x is complex."""
    if vector is None:
        raise ValueError(f"{name} is needed here, of shape {layout.shape}; got None.")
    vector = as_array(name, vector)
    if vector.shape != layout.shape:
        raise ValueError(
            f"{name} must have the shape of the feature axes {layout.features} of x, {layout.shape}; "
            f"got {vector.shape}. Nothing is broadcast here: check the channel count, or the axis argument."
        )
    complex_fits = x is not None and jnp.iscomplexobj(x)
    if not jnp.issubdtype(vector.dtype, jnp.number) or (jnp.iscomplexobj(vector) and not complex_fits):
        raise TypeError(f"{name} must be numbers, and real ones unless x is complex; got dtype {vector.dtype}.")
    return vector


def of_one_shape(what: str, *statistics: Any) -> Any:
    """Returns named tuples of per-channel arrays as they are, with all fields as arrays of one shape.

    Args:
      what: the name of the arguments, for the error.
      statistics: `Moments`, `RunningStats` and the like.

    Raises:
      TypeError: an argument is no named tuple, or holds no numbers.
      ValueError: the shapes differ; nothing is broadcast.
    """
    for s in statistics:
        if not hasattr(s, "_fields"):
            raise TypeError(f"{what} must be tuples such as bnjax.Moments(mean, var, count); got {type(s).__name__}.")
    named = [{k: v if v is None else as_array(k, v) for k, v in s._asdict().items()} for s in statistics]
    shapes = [v.shape for s in named for v in s.values() if v is not None]
    if len(set(shapes)) != 1:
        raise ValueError(f"{what} must have one feature shape in all their parts; got {shapes}. Nothing is broadcast.")
    return tuple(type(s)(**arrays) for s, arrays in zip(statistics, named, strict=True))


def as_optional(name: str, vector: jax.Array | None, layout: Layout, x: jax.Array | None = None) -> jax.Array | None:
    """Returns None for None, and otherwise a per-channel argument, checked as in `as_vector`."""
    return None if vector is None else as_vector(name, vector, layout, x)


def as_variance(var: jax.Array, layout: Layout) -> jax.Array:
    """Returns a running variance, with NaN in the channels where it is negative or infinite, so that y is NaN there."""
    vector, known = as_vector("var", var, layout), _known(var)
    if known is not None and not np.all((known >= 0) & (known < np.inf)):
        raise ValueError(
            f"var holds variances, which must be finite and not negative; got {known!r}. Such a running variance is "
            "broken: tools.inspect shows the layers, tools.recalibrate gives new ones."
        )
    return jnp.where((vector >= 0) & (vector < jnp.inf), vector, jnp.nan)


def check_stored(shape: tuple[int, ...], x: jax.Array, **stored: jax.Array | None) -> None:
    """Raises ValueError unless the variables of a module have the shape that x needs."""
    for name, value in stored.items():
        if value is not None and value.shape != shape:
            raise ValueError(
                f"the variable {name} of this layer must have shape {shape} for x of shape {x.shape}; it has "
                f"{value.shape}. Check the channel count of x, the axis argument (num_features in nnx), or whether the "
                "checkpoint is that of another model."
            )


def as_mask(mask: jax.Array | None, x: jax.Array) -> jax.Array | None:
    """Returns the mask with the rank of x, as bool or floating weights.

    It is not broadcast to the shape of x, so that sums over it stay small. A weight in a jax.Array that is negative or
    not finite becomes NaN.
    """
    if mask is None:
        return None
    known, mask = _known(mask), as_array("mask", mask)
    if jnp.iscomplexobj(mask):
        raise TypeError(f"mask must be bool, integer or floating weights; got dtype {mask.dtype}.")
    if known is not None and not np.all((known >= 0) & (known < np.inf)):
        raise ValueError(
            "mask holds weights, which must be finite and not negative; got "
            f"{known[~((known >= 0) & (known < np.inf))].ravel()[:4]}. Give weight 0 to what should not count."
        )
    shape = (1,) * (x.ndim - mask.ndim) + mask.shape
    fits = len(shape) == x.ndim and all(m in (1, n) for m, n in zip(shape, x.shape, strict=True))
    if not fits:
        raise ValueError(
            f"mask must be broadcastable to x; got mask {mask.shape} for x {x.shape}. "
            "A mask with one weight per row needs a trailing axis: mask[..., None]."
        )
    if mask.dtype == bool:
        return mask.reshape(shape)
    weights = mask.astype(_promoted(mask, jnp.float32))
    return jnp.where((weights >= 0) & (weights < jnp.inf), weights, jnp.nan).reshape(shape)


def takes_part(weights: jax.Array) -> jax.Array:
    """Returns bools: True where the weight is not zero."""
    return weights if weights.dtype == bool else weights > 0


def as_weights(mask: jax.Array | None, x: jax.Array) -> jax.Array | None:
    """Returns a checked mask as weights: bool as it is, floating in the dtype of the statistics, without gradient."""
    if mask is None or mask.dtype == bool:
        return mask
    return jax.lax.stop_gradient(mask.astype(jnp.finfo(statistics_dtype(x)).dtype))


def as_number(name: str, value: Any, least: float, most: float = math.inf, advice: str = "") -> float:
    """Returns an option as a float; raises unless it is one finite number from least to most, known at trace time."""
    if isinstance(value, jax.core.Tracer):
        raise ValueError(f"{name} must be a Python number, known when the call is traced; got a traced value. {advice}")
    if isinstance(value, (str, bytes, bool)) or not np.isrealobj(value) or np.size(value) != 1 or np.ndim(value):
        raise TypeError(f"{name} must be one real number; got {value!r}. {advice}")
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be one real number; got {value!r}. {advice}") from error
    if not (least <= number <= most and math.isfinite(number)):
        raise ValueError(f"{name} must be finite and in [{least:g}, {most:g}]; got {value!r}. {advice}")
    return number


def as_flag(name: str, value: Any) -> bool:
    """Returns an option as a bool; raises unless it is True or False, known when the call is traced."""
    if isinstance(value, jax.core.Tracer):
        raise ValueError(
            f"{name} must be True or False when the call is traced; got a traced value. Pass it as a Python bool (a "
            "keyword bound by functools.partial, or static_argnames of jax.jit), and trace each mode by itself."
        )
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (np.ndarray, jax.Array)) and value.dtype == bool and not value.ndim:
        return bool(value)
    hint = " A number of channels is num_features, of bnjax.nnx.BatchNorm; bnjax.linen.BatchNorm reads it off x."
    raise TypeError(f"{name} must be True or False; got {value!r}.{hint if isinstance(value, int) else ''}")


def as_integer(name: str, value: Any, least: int) -> int:
    """Returns an option as an integer; raises unless it is one, known when the call is traced, and at least `least`."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
        error = ValueError if isinstance(value, (int, float, jax.core.Tracer)) else TypeError
        raise error(f"{name} must be an integer of at least {least}, known when the call is traced; got {value!r}.")
    return int(value)


def check_epsilon(epsilon: float, dtype: np.dtype) -> float:
    """Returns epsilon as a float; raises ValueError where 1/√ε or its derivative, about ε^(−3/2), would overflow."""
    least = float(jnp.finfo(dtype).max) ** (-2 / 3)
    advice = f"Statistics of {dtype} need that where a channel is constant, or they divide by zero; 1e-5 is usual."
    return as_number("epsilon", epsilon, least, advice=advice)


_OLD = "It is the weight of the OLD running value; PyTorch's is the weight of the new one: pass 1 - m."


def as_momentum(momentum: jax.Array | float) -> jax.Array | float:
    """Returns the momentum, in [0, 1]; raises if a Python number is outside; a jax.Array becomes NaN there instead."""
    if not isinstance(momentum, jax.Array):
        return as_number("momentum", momentum, 0, 1, _OLD)
    if momentum.ndim or jnp.iscomplexobj(momentum):
        raise ValueError(f"momentum must be one real number; got {momentum.dtype} of shape {momentum.shape}. {_OLD}")
    return bounded_momentum(momentum)


def bounded_momentum(momentum: jax.Array) -> jax.Array:
    """Returns a computed momentum: clipped to [0, 1] where it is outside by less than 0.01 (rounding), else NaN."""
    nearest = jnp.clip(momentum, 0, 1)
    return jnp.where(jnp.abs(momentum - nearest) < 0.01, nearest, jnp.nan)


def statistics_dtype(*arrays: jax.Array | None) -> np.dtype:
    """Returns the dtype of statistics: the promotion of the arrays and float32, so float64 if any array has it."""
    return _promoted(*arrays, jnp.float32)


def _promoted(*arrays: Any) -> np.dtype:
    """Returns the standard promotion of the arrays and dtypes that are not None, also under strict dtype promotion."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.dtype(jnp.result_type(*[a for a in arrays if a is not None]))


def output_dtype(dtype: jax.typing.DTypeLike | None, *arrays: jax.Array | None) -> np.dtype:
    """Returns `dtype`, checked, or the promotion of the arrays if it is None, as Flax does."""
    promoted = _promoted(*arrays)
    if dtype is None:
        return promoted
    of_complex = jnp.issubdtype(promoted, jnp.complexfloating)
    try:
        dtype = jnp.dtype(dtype)
    except TypeError as error:
        raise TypeError(
            f"dtype is that of the output and must name one, such as jnp.bfloat16; got {dtype!r}."
        ) from error
    if not jnp.issubdtype(dtype, jnp.complexfloating if of_complex else jnp.floating):
        raise TypeError(
            f"dtype is that of the output and must be {'complex' if of_complex else 'floating'} where the input is "
            f"{promoted}; got {dtype}."
        )
    return jax.dtypes.canonicalize_dtype(dtype)
