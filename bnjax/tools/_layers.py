"""Standing between a model and its layers: a handler runs in place of each call of a layer.

A handler is given a `Call` (the layer, its path, its input) and returns the output, usually through `call.run`. For
linen, Flax's own interception hands the calls over. nnx has none: there the layers of a private copy of the model
change their class to a subclass that hands its calls over. Layers inside scan, vmap, remat and shard_map are met where
they are traced, with the statistics of that place.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from flax import nnx

from bnjax.functional import Normalization, RunningStats
from bnjax.functional._protocol import unstated
from bnjax.tools._trees import Path, flatten_with_layers, show

Handler = Callable[["Call"], jax.Array]

_LINEAR = (nn.Conv, nn.ConvTranspose, nn.Dense, nnx.Conv, nnx.ConvTranspose, nnx.Linear)

# What was traced under a handler must not be found in jit's cache by calls without it, nor the other way round.
_traced_under = jax.make_user_context(None)
_nnx_handler: ContextVar[Handler | None] = ContextVar("handler of nnx layers", default=None)


class Call(NamedTuple):
    """One call of a layer."""

    module: Any  # a linen or an nnx module
    path: Path
    x: jax.Array
    options: dict[str, Any]  # the other arguments, by name
    method: Callable[..., jax.Array]  # the layer's own __call__

    def run(self, x: jax.Array) -> jax.Array:
        """The layer's own output for x."""
        return self.method(x, **self.options)

    def run_on_running_average(self, x: jax.Array) -> jax.Array:
        """A normalization's output for x by its running averages, whatever the model asked for."""
        if isinstance(self.module, nnx.Module):
            return self.method(x, **{**self.options, "use_running_average": True})
        # linen refuses the argument where the field is set, so the field is set for the time of the call
        options = {name: value for name, value in self.options.items() if name != "use_running_average"}
        field = self.module.use_running_average
        object.__setattr__(self.module, "use_running_average", True)
        try:
            return self.method(x, **options)
        finally:
            object.__setattr__(self.module, "use_running_average", field)

    def stats(self) -> RunningStats:
        """The mean and variance that the layer holds now."""
        return RunningStats(*map(self._read, ("mean", "var")))

    def store(self, stats: RunningStats) -> None:
        """Gives the layer another mean and variance, in the shapes and dtypes it has."""
        if not (isinstance(self.module, nnx.Module) or self.module.is_mutable_collection("batch_stats")):
            raise ValueError(
                "apply_fn must let the statistics change: functools.partial(model.apply, mutable=['batch_stats'])."
            )
        for name, new in (("mean", stats.mean), ("var", stats.var)):
            old = self._read(name)
            new = new.astype(old.dtype).reshape(old.shape)
            if isinstance(self.module, nnx.Module):
                getattr(self.module, name)[...] = new
            else:
                self.module.put_variable("batch_stats", name, new)

    def _read(self, name: str) -> jax.Array:
        if isinstance(self.module, nnx.Module):
            return getattr(self.module, name)[...]
        return self.module.get_variable("batch_stats", name)


# What Flax's own classes and their subclasses compute, as long as these leave __call__ alone: batch normalization.
_FLAX_NORMS = (nn.BatchNorm, nnx.BatchNorm)
_BATCH_NORM = Normalization()


def is_norm(module: Any) -> bool:
    """Returns whether a module is a batch normalization: by its class, or because it owns a running mean and variance.

    The latter may compute anything: `unsaid` tells.
    """
    if isinstance(module, (Normalization, *_FLAX_NORMS)):
        return True
    if isinstance(module, nnx.Module):
        return all(isinstance(vars(module).get(name), nnx.BatchStat) for name in ("mean", "var"))
    return module.scope is not None and all(module.has_variable("batch_stats", name) for name in ("mean", "var"))


def unsaid(module: Any) -> str:
    """Returns why the tools do not know what a layer computes, and what to write; empty where they do."""
    cls = _own_class(module)
    if issubclass(cls, Normalization):
        return unstated(object.__new__(cls))  # which asks the class alone
    if any(issubclass(cls, flax) and cls.__call__ is flax.__call__ for flax in _FLAX_NORMS):
        return ""
    return (
        f"{cls.__name__} holds a running mean and variance and does not say what it computes with them. Derive it from "
        "bnjax.Normalization (too) and define averaged_moments and evaluation_affine in it, or write "
        "averaged_moments = bnjax.Normalization.averaged_moments there, and likewise the other, if they are as in "
        "batch normalization."
    )


def described(module: Any, path: Path = ()) -> Normalization:
    """Returns the object that answers for a layer: the layer itself, or batch normalization for Flax's own classes.

    Raises:
      ValueError: the class of the layer does not say what it computes.
    """
    if problem := unsaid(module):
        raise ValueError(f"{show(path)}: {problem}" if path else problem)
    return module if isinstance(module, Normalization) else _BATCH_NORM


def _own_class(module: Any) -> type:
    """Returns the class that the author of a module gave it, under the spy that `spied` may have put on it."""
    return next(c for c in type(module).__mro__ if not c.__dict__.get("is_spy"))


def is_linear(module: Any) -> bool:
    """Whether a module is a convolution or a dense layer."""
    return type(module) in _LINEAR  # a subclass may do more to its kernel than multiply by it


@contextmanager
def handling(handler: Handler, key: Hashable = None) -> Iterator[None]:
    """Within it, `handler` runs in place of the calls of normalization, convolution and dense layers.

    `key` stands for the handler in the cache of `jit`: equal keys, equal handlers. By default no other is equal.
    """

    def intercept(method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__" or not (is_norm(module) or is_linear(module)):
            return method(*args, **kwargs)
        return handler(_call(module, tuple(module.path), method, *args, **kwargs))

    token = _nnx_handler.set(handler)
    try:
        with nn.intercept_methods(intercept), _traced_under(object() if key is None else key):
            yield
    finally:
        _nnx_handler.reset(token)


def _call(module: Any, path: Path, method: Any, *args: Any, **kwargs: Any) -> Call:
    options = dict(kwargs)
    x = args[0] if args else options.pop("x" if "x" in options else "inputs")
    if len(args) > 1:  # the only second positional argument among these layers
        options["use_running_average"] = args[1]
    return Call(module, path, x, options, method)


def spied(model: nnx.Module) -> nnx.Module:
    """`model`, a private copy, whose layers hand their calls to the handler that is in force."""
    for path, module in nnx.iter_modules(model):
        if is_norm(module) or is_linear(module):
            module.__class__ = _spy_class(type(module))
            module.spy_path = tuple(map(str, path))  # type: ignore[attr-defined]
    return model


@cache
def _spy_class(cls: type) -> type:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        handler, method = _nnx_handler.get(), partial(cls.__call__, self)
        if handler is None:
            return method(*args, **kwargs)
        return handler(_call(self, self.spy_path, method, *args, **kwargs))

    return type(cls.__name__, (cls,), {"__call__": __call__, "__module__": cls.__module__, "is_spy": True})


class Program(NamedTuple):
    """A model as a function of its variables: `run(state, batch)` returns its output and its variables after it."""

    run: Callable[[Any, Any], tuple[Any, Any]]
    state: Any


def program(apply_fn: Callable[..., Any], variables: Any) -> Program:
    """`apply_fn` over the variables, for linen and for an nnx module.

    linen: `apply_fn(variables, batch)` returns `(output, updates)`, as `Module.apply(..., mutable=[...])` does.
    nnx: `variables` is the module and `apply_fn(module, batch)` calls it.
    """
    flatten_with_layers(variables)
    if not isinstance(variables, nnx.Module):
        return Program(apply_fn, variables)
    graph, state = nnx.split(variables)

    def run(state: Any, batch: Any) -> tuple[Any, Any]:
        model = spied(nnx.merge(graph, state))
        output = apply_fn(model, batch)
        return output, nnx.state(model)

    return Program(run, state)
