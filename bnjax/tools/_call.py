"""One call of a layer: what it was given, and how to run it."""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
from flax import nnx

from bnjax.functional import RunningStats
from bnjax.tools._described import own_class
from bnjax.tools._trees import Path, show


class Call(NamedTuple):
    """One call of a layer."""

    module: Any  # a linen or an nnx module
    path: Path
    x: jax.Array
    rest: tuple[Any, ...]  # further positional arguments, which have no names
    options: dict[str, Any]  # the other arguments, by name
    method: Callable[..., jax.Array]  # the layer's own __call__

    def run(self, x: jax.Array) -> jax.Array:
        """Returns the layer's own output for x."""
        return self.method(x, *self.rest, **self.options)

    def run_on_running_average(self, x: jax.Array) -> jax.Array:
        """Returns a normalization's output for x by its running averages, whatever the model asked for."""
        asks = "use_running_average" in _argument_names(own_class(self.module))
        options = {name: value for name, value in self.options.items() if name != "use_running_average"}
        if not hasattr(self.module, "use_running_average"):
            if not asks:
                raise ValueError(
                    f"{show(self.path)} cannot be told to use its running averages: give the __call__ of "
                    f"{own_class(self.module).__name__} an argument use_running_average."
                )
            return self.method(x, *self.rest, **options, use_running_average=True)
        if asks and isinstance(self.module, nnx.Module):
            return self.method(x, *self.rest, **options, use_running_average=True)
        # linen refuses the argument where the field is set, so the field is set for the time of the call
        field = self.module.use_running_average
        object.__setattr__(self.module, "use_running_average", True)
        try:
            return self.method(x, *self.rest, **options)
        finally:
            object.__setattr__(self.module, "use_running_average", field)

    def stats(self) -> RunningStats:
        """Returns the mean and variance that the layer holds now."""
        return RunningStats(*map(self._read, ("mean", "var")))

    def store(self, stats: RunningStats) -> None:
        """Gives the layer another mean and variance, of any shape and dtype."""
        nnx_module = isinstance(self.module, nnx.Module)
        if not (nnx_module or self.module.is_mutable_collection("batch_stats")):
            raise ValueError(
                "apply_fn must let the statistics change: functools.partial(model.apply, mutable=['batch_stats'])."
            )
        for name, new in (("mean", stats.mean), ("var", stats.var)):
            if nnx_module:
                getattr(self.module, name).set_value(new)
            else:
                self.module.put_variable("batch_stats", name, new)

    def _read(self, name: str) -> jax.Array:
        if isinstance(self.module, nnx.Module):
            return getattr(self.module, name)[...]
        return self.module.get_variable("batch_stats", name)


def call_of(module: Any, path: Path, method: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Call:
    """Returns the call of a layer with these arguments, the first of which is its input."""
    names, options = _argument_names(own_class(module)), dict(kwargs)
    if not names:  # __call__(self, *args): only the first is known
        return Call(module, path, args[0] if args else options.pop("x"), args[1:], options, method)
    options |= zip(names, args, strict=False)
    return Call(module, path, options.pop(names[0]), (), options, method)


@cache
def _argument_names(cls: type) -> tuple[str, ...]:
    """Returns the names of the positional arguments of a layer; none where it takes any number of them."""
    parameters = list(inspect.signature(cls.__call__).parameters.values())[1:]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return ()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
