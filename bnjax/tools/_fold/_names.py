"""What people call an operation: by the Flax module or the function that it is in, else by a word for it."""

import os
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from bnjax.tools._fold._flow import ARGUMENT, RESULT, Op

_WORDS = {
    "reduce_window_max": "max-pool",
    "reduce_window_min": "min-pool",
    "reduce_window_sum": "average pool",
    "conv_general_dilated": "a convolution of its own",
    "dot_general": "a matrix product",
    "cond": "a branch",
    "while": "a loop",
    "scan": "a loop",
    "concatenate": "concatenate",
    "reshape": "reshape",
    "transpose": "transpose",
    "pad": "pad",
    **dict.fromkeys(("add", "add_any"), "a sum"),
    "sub": "a difference",
    "mul": "a product",
    "div": "a quotient",
}
_LIBRARIES = tuple(os.path.join(*module.__path__, "") for module in (jax, flax))


def name_of(op: Op, around: frozenset[str] = frozenset()) -> str:
    """Returns a name for people, such as `"DenseGeneral"`, `"relu"` or `"max-pool"`.

    Args:
      op: the operation.
      around: names of modules that are no answer, because what is asked about is in them too.
    """
    if op.name == RESULT:
        return "the output of the model" if op.eqn is None else f"the result of {name_of(op._replace(name=''), around)}"
    if op.name == ARGUMENT:
        return _WORDS.get(op.eqn.primitive.name, op.eqn.primitive.name)
    module, function = _where(op, around)
    name = op.name or op.eqn.primitive.name
    return f"a {module}" if module else op.called or _WORDS.get(name) or function or name


def modules_around(op: Op) -> frozenset[str]:
    """Returns the names of the modules in whose call an operation is."""
    names = (_module(frame) for frame in _frames(op))
    return frozenset(name for name in names if name)


def _where(op: Op, around: frozenset[str]) -> tuple[str, str]:
    """Returns the innermost module of Flax, and the outermost public function in it, in which an operation is."""
    function = ""
    for frame in _frames(op):
        if not frame.file_name.startswith(_LIBRARIES):
            break
        if (module := _module(frame)) and (hasattr(nn, module) or hasattr(nnx, module)):
            return ("" if module in around else module), function
        name = frame.function_name.strip("_")
        if any(hasattr(library, name) for library in (jax.nn, jnp, jax.lax, nn)):
            function = name
    return "", function


def _module(frame: Any) -> str:
    """Returns the name of the class, where a frame is a `__call__` of one."""
    name, _, method = frame.function_name.rpartition(".")
    return name.rpartition(".")[2] if method == "__call__" else ""


def _frames(op: Op) -> list[Any]:
    """Returns the calls in which an operation was traced, the innermost first."""
    traceback = getattr(getattr(op.caller, "source_info", None), "traceback", None)
    return list(traceback.frames) if traceback else []
