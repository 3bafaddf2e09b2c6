"""Initialises and writes the variables of nnx modules."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from flax.errors import TraceContextError
from flax.nnx.variablelib import VariableMetadata

_CAPTURED = (
    "Running averages were about to be updated in a function that captured their variables from outside, where the new "
    "values could not be seen. Pass the module as an argument (nnx.grad, nnx.jit, ...); or merge it inside with "
    "variables of its own, nnx.merge(graphdef, params, rest, copy=True), and return its state; or pass "
    "update_stats=False."
)


def static(value: Any) -> Any:
    """Returns a field with its lists converted to tuples, nested ones too, so that the graphdef can be hashed."""
    return tuple(map(static, value)) if isinstance(value, (list, tuple)) else value


def minus(start: Any, offset: float) -> Any:
    """Subtracts the offset from the array that an initializer returned, which metadata may wrap."""
    if isinstance(start, VariableMetadata):
        return dataclasses.replace(start, raw_value=start.raw_value - offset)
    return start - offset if offset else start


def write(module: nnx.Module, values: Mapping[str, jax.Array | None]) -> None:
    """Writes values to the module's variables of the same names, in the shapes of these; a None is left out."""
    for name, value in values.items():
        if value is None:
            continue
        variable = getattr(module, name)
        value = value.reshape(variable.shape)
        try:
            if isinstance(variable.get_raw_value(), jax.Array) and value.dtype == variable.dtype:
                variable[...] = value
            else:  # assignment in place would change a NumPy array of a checkpoint, and round a wider dtype
                variable.set_value(value)
        except TraceContextError as error:
            error.add_note(_CAPTURED)
            raise
