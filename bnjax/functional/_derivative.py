"""Defines two functions with derivatives of their own: `value_of` and `widen`.

`value_of` returns a measured value with the derivative of a formula. It is a primitive and not a `jax.custom_jvp`,
because reverse mode of `lax.scan` inlines the primal of a `custom_jvp` after its first use: a second derivative would
then follow the primal instead of the rule. A primitive keeps its rule under every transform, so the measured value may
stand behind `stop_gradient`, conditionals and collectives, which are never differentiated.

`widen` converts x to the dtype of the statistics, so that dx is rounded only once.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import jet
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun, primitives
from jax.interpreters import ad, batching, mlir

from bnjax.functional._axes import statistics_dtype

_value_of_p = Primitive("value_of")


def value_of(value: jax.Array, formula: jax.Array) -> jax.Array:
    """Returns `value`, with the derivative of `formula`, to every order and in both modes.

    Only the tangents of `formula` are computed: XLA removes its value as dead code.

    Args:
      value: an array; no derivative flows to it.
      formula: an array of the same shape and dtype, equal to `value` up to rounding.
    """
    return _value_of_p.bind(value, formula)


def _batched(arrays: Any, axes: Any) -> tuple[jax.Array, int]:
    """Applies `value_of` to mapped arguments (the rule of `vmap`); returns the result and its mapped axis, 0."""
    size = next(a.shape[d] for a, d in zip(arrays, axes, strict=True) if d is not None)
    return value_of(*(batching.bdim_at_front(a, d, size) for a, d in zip(arrays, axes, strict=True))), 0


_value_of_p.def_impl(lambda value, formula: value)
_value_of_p.def_abstract_eval(lambda value, formula: value)
mlir.register_lowering(_value_of_p, lambda context, value, formula: [value])
ad.primitive_jvps[_value_of_p] = lambda primals, tangents: (value_of(*primals), tangents[1])
batching.primitive_batchers[_value_of_p] = _batched


def _jet_of_checkpoint(primals: Any, series: Any, *, jaxpr: Any, **_: Any) -> Any:
    """Differentiates through `jax.checkpoint`, for which `jax.experimental.jet` has no rule of its own."""
    return jet.jet(jaxpr_as_fun(ClosedJaxpr(jaxpr, ())), primals, series, factorial_scaled=False)


_jet_rules: dict[Any, Any] = jet.jet_rules
_jet_rules[_value_of_p] = lambda primals, series: (value_of(*primals), series[1])
_jet_rules.setdefault(primitives.remat_p, _jet_of_checkpoint)


@jax.custom_jvp
def widen(x: jax.Array) -> jax.Array:
    """Converts x to the dtype of the statistics; the terms of dx are added in that dtype and rounded once.

    XLA:TPU writes y and dx in one pass over x only where dx does not end in a conversion: a layer in bfloat16 then
    makes 7 passes over x, and 8 otherwise. So dx ends in `reduce_precision`, which keeps one bit more than the dtype of
    x has.
    """
    return x.astype(statistics_dtype(x))


@widen.defjvp
def _widen_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Returns the widened x and its tangent, first rounded to one bit more than the dtype of x has."""
    (t,) = tangents
    wide = statistics_dtype(t)
    if wide != t.dtype:
        kind = jnp.finfo(t.dtype)
        t = lax.reduce_precision(t, exponent_bits=kind.nexp, mantissa_bits=kind.nmant + 1)
    return widen(*primals), t.astype(wide)
