"""One compiled program for a function and the structure of its variables, however often the function is made anew."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import jax

from bnjax.tools import _trees
from bnjax.tools._layers import run_module
from bnjax.tools._recalibrate._moments import gather, widened
from bnjax.tools._trees import Path, show


def compiled(apply_fn: Callable[..., Any], graph: Any) -> Any:
    """Returns the program: the same one for the same function, so that it is compiled once for all calls."""
    try:
        return _program(_Function(apply_fn), graph)
    except TypeError:  # a model that cannot be hashed
        return _program.__wrapped__(_Function(apply_fn), graph)


@lru_cache(maxsize=8)
def _program(function: "_Function", graph: Any) -> Any:
    run = function.call if graph is None else partial(run_module, function.call, graph)

    def step(state: Any, weights: dict[Path, jax.Array], batch: Any, *, others_train: bool) -> Any:
        tree = gather(run, widened(_trees.flatten(state), weights), batch, others_train=others_train)
        refuse_missing([layer for layer in weights if layer not in tree.layers])
        return {layer: tree.stats(layer) for layer in weights}

    return jax.jit(step, static_argnames="others_train")


class _Function:
    """`apply_fn`, equal to another one that calls the same function with the same arguments (`functools.partial`)."""

    def __init__(self, call: Callable[..., Any]):
        self.call, self._key = call, _key(call)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Function) and self._key == other._key


def _key(value: Any, around: tuple[Any, ...] = ()) -> Any:
    """Returns what is equal for equal values: itself, or its parts; the identity of what neither hashes nor opens.

    Functions are equal that have the same code and the same values around it: a lambda in a loop is one function. The
    values are those of closures, defaults and globals, also of the functions of one file that they call.

    Args:
      value: the value.
      around: what it is a part of, the whole first.
    """
    if any(value is whole for whole in around):
        return "itself"
    part = partial(_key, around=(*around, value))
    if isinstance(value, FunctionType):
        home = next(whole for whole in (*around, value) if isinstance(whole, FunctionType)).__globals__
        if value.__globals__ is not home:
            return _Same(value)
        used = [home[name] for name in _names_in(value.__code__) if name in home]
        closed = [cell.cell_contents for cell in value.__closure__ or ()]
        return value.__code__, part([*closed, *used, value.__defaults__, value.__kwdefaults__])
    if isinstance(value, MethodType):
        return value.__func__, part(value.__self__)
    if isinstance(value, partial):
        return partial, part(value.func), part(value.args), part(value.keywords)
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(part, value))
    if isinstance(value, dict):
        return dict, tuple((k, part(v)) for k, v in value.items())
    try:
        hash(value)
    except TypeError:
        return _Same(value)
    return type(value), value


def _names_in(code: CodeType) -> list[str]:
    """Returns the names that a function, or one inside of it, may look up among the globals."""
    inner = [name for item in code.co_consts if isinstance(item, CodeType) for name in _names_in(item)]
    return sorted({*code.co_names, *inner})


class _Same:
    """Equal to nothing but another look at the same object, which it keeps from being replaced by a new one."""

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value


def refuse_missing(layers: Sequence[Path]) -> None:
    if layers:
        raise ValueError(
            f"apply_fn ran no batch normalization with the statistics of {[show(layer) for layer in layers]}, or did "
            "not return what it left there. Name the layers that run in layers=[...], and return all updates of "
            "batch_stats; a layer that nnx.bridge.ToLinen wraps cannot be seen."
        )
