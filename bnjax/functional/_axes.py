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
    """An argument as an array of numbers; float8 and those of less than a byte, which JAX does not promote, as float32.

    Raises TypeError for what holds none (None, text, objects, dates, ragged lists, keys, shapes without values) and
    for a masked array of NumPy, whose mask JAX would drop.
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
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.finfo(dtype).bits < 16
    return jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).bits < 8


def _known(a: Any) -> np.ndarray[Any, Any] | None:
    """The values of an argument given as Python numbers or NumPy array, inside a trace as outside.

    None of a jax.Array: its values are data, of which a traced function knows nothing. Where such data are out of range
    the result is NaN, in a trace and outside of it alike; and no eager call waits for a device to look at them.
    """
    return None if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(a)) else np.asarray(a)


def as_input(x: jax.Array) -> jax.Array:
    """x as a floating-point or complex array; integers and bools become float32."""
    x = as_array("x", x)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)


def as_real_input(x: jax.Array) -> jax.Array:
    """The same, for what has no complex form."""
    x = as_input(x)
    if jnp.iscomplexobj(x):
        raise TypeError(f"x must be real; got dtype {x.dtype}. Normalise x.real and x.imag as two channels instead.")
    return x


def as_vector(name: str, vector: jax.Array, layout: Layout, x: jax.Array | None = None) -> jax.Array:
    """A per-channel argument, checked to have exactly the feature shape; complex only where an x is given that is."""
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
    """Tuples of per-channel arrays, checked to have one shape in all their parts: none of them is broadcast."""
    for s in statistics:
        if not hasattr(s, "_fields"):
            raise TypeError(f"{what} must be tuples such as bnjax.Moments(mean, var, count); got {type(s).__name__}.")
    named = [{k: v if v is None else as_array(k, v) for k, v in s._asdict().items()} for s in statistics]
    shapes = [v.shape for s in named for v in s.values() if v is not None]
    if len(set(shapes)) != 1:
        raise ValueError(f"{what} must have one feature shape in all their parts; got {shapes}. Nothing is broadcast.")
    return tuple(type(s)(**arrays) for s, arrays in zip(statistics, named, strict=True))


def as_optional(name: str, vector: jax.Array | None, layout: Layout, x: jax.Array | None = None) -> jax.Array | None:
    """The same, for an argument that may be left out."""
    return None if vector is None else as_vector(name, vector, layout, x)


def as_variance(var: jax.Array, layout: Layout) -> jax.Array:
    """A running variance; NaN in a channel where it is none (negative, infinite), so that its output is NaN too."""
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
    """Returns the mask at the rank of x, bool or floating, not broadcast, so that sums over it stay small.

    A weight in a jax.Array that is negative or not finite becomes NaN.
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
    """Returns where weights are not zero, as bools."""
    return weights if weights.dtype == bool else weights > 0


def as_weights(mask: jax.Array | None, x: jax.Array) -> jax.Array | None:
    """Returns a checked mask as the weights of sums: bool as it is, else in the dtype of the statistics, constant."""
    if mask is None or mask.dtype == bool:
        return mask
    return jax.lax.stop_gradient(mask.astype(jnp.finfo(statistics_dtype(x)).dtype))


def as_number(name: str, value: Any, least: float, most: float = math.inf, advice: str = "") -> float:
    """An option as a float; raises unless it is one number, known when the call is traced, finite and in the range."""
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
    """Returns an option as a bool; raises unless it is one, known when the call is traced."""
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
    """An option as an integer, of at least so much."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
        error = ValueError if isinstance(value, (int, float, jax.core.Tracer)) else TypeError
        raise error(f"{name} must be an integer of at least {least}, known when the call is traced; got {value!r}.")
    return int(value)


def check_epsilon(epsilon: float, dtype: np.dtype) -> float:
    """epsilon as a float; raises ValueError unless 1/√ε and its derivative, of the size of ε^(−3/2), are numbers."""
    least = float(jnp.finfo(dtype).max) ** (-2 / 3)
    advice = f"Statistics of {dtype} need that where a channel is constant, or they divide by zero; 1e-5 is usual."
    return as_number("epsilon", epsilon, least, advice=advice)


_OLD = "It is the weight of the OLD running value; PyTorch's is the weight of the new one: pass 1 - m."


def as_momentum(momentum: jax.Array | float) -> jax.Array | float:
    """momentum, the weight of the old value, in [0, 1]; raises ValueError where it is known to be something else."""
    if not isinstance(momentum, jax.Array):
        return as_number("momentum", momentum, 0, 1, _OLD)
    if momentum.ndim or jnp.iscomplexobj(momentum):
        raise ValueError(f"momentum must be one real number; got {momentum.dtype} of shape {momentum.shape}. {_OLD}")
    return bounded_momentum(momentum)


def bounded_momentum(momentum: jax.Array) -> jax.Array:
    """A computed momentum: one that rounding took out of [0, 1] is put back, another becomes NaN."""
    nearest = jnp.clip(momentum, 0, 1)
    return jnp.where(jnp.abs(momentum - nearest) < 0.01, nearest, jnp.nan)


def statistics_dtype(*arrays: jax.Array | None) -> np.dtype:
    """The dtype of statistics: float32 at least, float64 if any of the arrays is."""
    return _promoted(*arrays, jnp.float32)


def _promoted(*arrays: Any) -> np.dtype:
    """Returns the promotion of the arrays and dtypes that are given, by the standard rules under strict ones too."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.dtype(jnp.result_type(*[a for a in arrays if a is not None]))


def output_dtype(dtype: jax.typing.DTypeLike | None, *arrays: jax.Array | None) -> np.dtype:
    """`dtype`, or else the promotion of the arrays that are given (Flax's rule)."""
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
