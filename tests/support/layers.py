"""Gives linen and nnx layers one interface, for tests of both: `LAYERS[api](shape, axis=..., **fields)`.

`name` is the class of the module, and `call` holds arguments that every call needs.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import bnjax


class Linen:
    """A linen layer with its variables; calling it updates them."""

    def __init__(self, shape, name="BatchNorm", call=None, **fields):
        self.module = getattr(bnjax.linen, name)(**fields)
        self.call = dict(call or {}, use_running_average=False)
        given = {k: jnp.zeros(self._features(shape)) for k in ("scale", "bias") if fields.get(f"use_{k}") is False}
        self.variables = self.module.init(jax.random.key(0), jnp.zeros(shape), **self.call, **given)

    def _features(self, shape):
        axis = self.module.axis
        return tuple(shape[a] for a in ((axis,) if isinstance(axis, int) else sorted(a % len(shape) for a in axis)))

    def __call__(self, x, **options):
        options = self.call | options
        y, updates = self.module.apply(self.variables, x, **options, mutable=["batch_stats"])
        self.variables = {**self.variables, **updates}
        return y

    @property
    def stats(self):
        return {k: np.asarray(v) for k, v in self.variables["batch_stats"].items()}

    @property
    def params(self):
        return {k: np.asarray(v) for k, v in self.variables.get("params", {}).items()}

    def load(self, stats, params=None):
        self.variables = {**self.variables, "batch_stats": jax.tree.map(jnp.asarray, stats)}
        if params is not None:
            self.variables["params"] = params

    def grad(self, loss, x, **options):
        """Returns the gradient of loss(y) in the parameters."""
        options = self.call | options
        rest = {k: v for k, v in self.variables.items() if k != "params"}

        def through(params):
            return loss(self.module.apply({"params": params, **rest}, x, **options, mutable=["batch_stats"])[0])

        return jax.grad(through)(self.variables["params"])


class Nnx:
    """An nnx layer with the interface of `Linen`; the module holds its own variables."""

    def __init__(self, shape, name="BatchNorm", call=None, **fields):
        axis = fields.get("axis", -1)
        axes = (axis,) if isinstance(axis, int) else sorted(a % len(shape) for a in axis)
        self.module = getattr(bnjax.nnx, name)([shape[a] for a in axes], **fields, rngs=nnx.Rngs(0))
        self.call = call or {}

    def __call__(self, x, **options):
        return self.module(x, **self.call, **options)

    def _state(self, kind):
        return {k: np.asarray(v[...]) for k, v in nnx.state(self.module, kind).items()}

    @property
    def stats(self):
        return self._state(nnx.BatchStat)

    @property
    def params(self):
        return self._state(nnx.Param)

    def load(self, stats, params=None):
        nnx.update(self.module, {k: nnx.BatchStat(jnp.asarray(v)) for k, v in stats.items()})
        nnx.update(self.module, {k: nnx.Param(jnp.asarray(v)) for k, v in (params or {}).items()})

    def grad(self, loss, x, **options):
        grads = nnx.grad(lambda module: loss(module(x, **self.call, **options)))(self.module)
        return {k: v[...] for k, v in grads.items()}


LAYERS = dict(linen=Linen, nnx=Nnx)
