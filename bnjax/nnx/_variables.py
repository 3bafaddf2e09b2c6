"""Variables of nnx modules: read in the feature shape, written also where they come from outside the trace."""

import math
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from flax.errors import TraceContextError

from bnjax.functional._axes import Layout
from bnjax.functional._domains import ONE, Domains

_CAPTURED = (
    "Running averages were about to be updated in a function that captured their module from outside. Pass the module "
    "as an argument (nnx.grad, nnx.jit, ...), or merge it inside and return its state, or pass update_stats=False."
)


def static(value: Any) -> Any:
    """Lists as tuples, for a graphdef that hashes."""
    return tuple(map(static, value)) if isinstance(value, (list, tuple)) else value


def read(variable: nnx.Variable[jax.Array], layout: Layout, domains: Domains = ONE) -> jax.Array:
    """The value, in the feature shape also where the variable is flat (one number for several feature axes)."""
    value = domains.take(variable[...])
    return value.reshape(layout.shape) if value.shape == (math.prod(layout.shape),) else value


def write(module: nnx.Module, values: Mapping[str, jax.Array], domains: Domains = ONE) -> None:
    """Puts the values into the module's variables of those names, in their shapes.

    A variable from outside the trace is replaced by a new one. That is `nnx.merge(graphdef, params, rest)` inside
    `jax.grad`: the module is of this trace, the variables in `rest` are not. `nnx.state(module)` then holds the new
    ones, and `rest` stays as it was: a value of this trace may not get there.
    """
    for name, value in values.items():
        variable = getattr(module, name)
        row = variable.shape if domains.number is None else variable.shape[1:]
        value = domains.put(variable[...], value.reshape(row))
        try:
            if isinstance(variable.get_raw_value(), jax.Array) and value.dtype == variable.dtype:
                variable[...] = value
            else:  # NumPy's, from a checkpoint, would be overwritten; a real mean would stay real in a complex batch
                variable.set_value(value)
        except TraceContextError:
            _replace(module, name, variable.copy(value))


def _replace(module: nnx.Module, name: str, variable: nnx.Variable[jax.Array]) -> None:
    try:
        setattr(module, name, variable)
    except TraceContextError as error:
        error.add_note(_CAPTURED)
        raise
