"""Standing between a model and its layers: a handler runs in place of each call of a layer.

A handler is given a `Call` (the layer, its path, its input) and returns the output, usually through `call.run`. For
linen, Flax's own interception hands the calls over. nnx has none: there the layers of a private copy of the model
change their class to a subclass that hands its calls over. Layers inside scan, vmap, remat and shard_map are met where
they are traced, with the statistics of that place. A linen model in an nnx one (`nnx.bridge.ToNNX`) is met too.
"""

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from flax import nnx

from bnjax.tools._call import Call as Call
from bnjax.tools._call import call_of
from bnjax.tools._described import described as described
from bnjax.tools._described import is_linear as is_linear
from bnjax.tools._described import is_norm as is_norm
from bnjax.tools._described import own_class as own_class
from bnjax.tools._described import unsaid as unsaid
from bnjax.tools._trees import Path, flatten_with_layers

Handler = Callable[["Call"], jax.Array]


class _Active(threading.local):
    """The handlers in force in this thread, each with its key; the last one meets a call first."""

    handlers: tuple[tuple[Handler, Hashable], ...] = ()
    prefix: Path = ()  # of the nnx module around a linen model
    interception = ExitStack()
    cache_key = ExitStack()


_active = _Active()
# What was traced under a handler must not be found in jit's cache by calls without it, nor the other way round.
_traced_under = jax.make_user_context(None)


@contextmanager
def handling(handler: Handler, key: Hashable = None) -> Iterator[None]:
    """Runs `handler` in place of the calls of normalization, convolution and dense layers, while the context is open.

    Contexts may be left in another order than they were entered in.

    Args:
      handler: receives a `Call` and returns the output of the layer.
      key: stands for the handler in the cache of `jit`: equal keys, equal handlers. By default no other is equal.
    """
    entry = (handler, object() if key is None else key)
    _set_handlers((*_active.handlers, entry))
    try:
        yield
    finally:
        _set_handlers(tuple(e for e in _active.handlers if e is not entry))


def _set_handlers(handlers: tuple[tuple[Handler, Hashable], ...]) -> None:
    if handlers and not _active.handlers:
        _active.interception = ExitStack()
        _active.interception.enter_context(nn.intercept_methods(_intercept))
    _active.cache_key.close()
    _active.cache_key = ExitStack()
    if handlers:
        _active.cache_key.enter_context(_traced_under(tuple(key for _, key in handlers)))
    elif _active.handlers:
        _active.interception.close()
    _active.handlers = handlers


@contextmanager
def no_handling() -> Iterator[None]:
    """Stops handing calls over while the context is open: for what a handler itself calls in place of a layer."""
    handlers, _active.handlers = _active.handlers, ()
    try:
        yield
    finally:
        _active.handlers = handlers


def _intercept(method: Any, args: Any, kwargs: Any, context: Any) -> Any:
    module = context.module
    if context.method_name != "__call__" or not _active.handlers or not (is_norm(module) or is_linear(module)):
        return method(*args, **kwargs)
    return _hand_over(module, (*_active.prefix, *module.path), method, args, kwargs)


def _hand_over(module: Any, path: Path, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    for handler, _ in _active.handlers:
        method = partial(_handle, handler, module, path, method)
    return method(*args, **kwargs)


def _handle(handler: Handler, module: Any, path: Path, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return handler(call_of(module, path, method, args, kwargs))


def spied(model: nnx.Module) -> nnx.Module:
    """Makes the layers of `model`, a private copy, hand their calls to the handlers in force; returns the model."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, nnx.bridge.ToNNX) or is_norm(module) or is_linear(module):
            module.__class__ = _spy_class(type(module), tuple(map(str, path)))
    return model


@cache
def _spy_class(cls: type, path: Path) -> type:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        if not _active.handlers:
            return cls.__call__(self, *args, **kwargs)
        if issubclass(cls, nnx.bridge.ToNNX):
            with _inside(path):
                return cls.__call__(self, *args, **{"mutable": ["batch_stats"], **kwargs})
        return _hand_over(self, path, partial(cls.__call__, self), args, kwargs)

    return type(cls.__name__, (cls,), {"__call__": __call__, "__module__": cls.__module__, "is_spy": True})


@contextmanager
def _inside(path: Path) -> Iterator[None]:
    """Puts the path of an nnx module before those of the linen layers in it."""
    prefix, _active.prefix = _active.prefix, path
    try:
        yield
    finally:
        _active.prefix = prefix


class Program(NamedTuple):
    """A model as a function of its variables: `run(state, batch)` returns its output and its variables after it."""

    run: Callable[[Any, Any], tuple[Any, Any]]
    state: Any


def program(apply_fn: Callable[..., Any], variables: Any) -> Program:
    """Returns `apply_fn` over the variables, for linen and for an nnx module.

    linen: `apply_fn(variables, batch)` returns `(output, updates)`, as `Module.apply(..., mutable=[...])` does.
    nnx: `variables` is the module and `apply_fn(module, batch)` calls it.
    """
    flatten_with_layers(variables)
    if not isinstance(variables, nnx.Module):
        return Program(apply_fn, variables)
    graph, state = nnx.split(variables)
    return Program(partial(run_module, apply_fn, graph), state)


def run_module(apply_fn: Callable[..., Any], graph: Any, state: Any, batch: Any) -> tuple[Any, Any]:
    """Calls `apply_fn` with a copy of an nnx module whose layers hand their calls over; returns its variables too."""
    model = spied(nnx.merge(graph, state))
    output = apply_fn(model, batch)
    return output, nnx.state(model)
