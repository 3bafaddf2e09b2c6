"""linen and nnx behind one face, for tests of what both must do: `LAYERS[api](shape, axis=..., **fields)`."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import bnjax


class Linen:
    """A linen layer with its variables; calling it updates them."""

    def __init__(self, shape, **fields):
        self.module = bnjax.linen.BatchNorm(**fields)
        given = {k: jnp.zeros(self._features(shape)) for k in ("scale", "bias") if fields.get(f"use_{k}") is False}
        self.variables = self.module.init(jax.random.key(0), jnp.zeros(shape), use_running_average=False, **given)

    def _features(self, shape):
        axis = self.module.axis
        return tuple(shape[a] for a in ((axis,) if isinstance(axis, int) else sorted(a % len(shape) for a in axis)))

    def __call__(self, x, **options):
        options = {"use_running_average": False} | options
        y, updates = self.module.apply(self.variables, x, **options, mutable=["batch_stats"])
        self.variables = {**self.variables, **updates}
        return y

    @property
    def stats(self):
        return {k: np.asarray(v) for k, v in self.variables["batch_stats"].items()}

    @property
    def params(self):
        return {k: np.asarray(v) for k, v in self.variables.get("params", {}).items()}

    def load(self, stats):
        self.variables = {**self.variables, "batch_stats": jax.tree.map(jnp.asarray, stats)}

    def grad(self, loss, x, **options):
        """The gradient of loss(y) in the parameters."""
        options = {"use_running_average": False} | options
        rest = {k: v for k, v in self.variables.items() if k != "params"}

        def through(params):
            return loss(self.module.apply({"params": params, **rest}, x, **options, mutable=["batch_stats"])[0])

        return jax.grad(through)(self.variables["params"])


class Nnx:
    """The same for nnx, whose modules hold their variables."""

    def __init__(self, shape, **fields):
        axis = fields.get("axis", -1)
        axes = (axis,) if isinstance(axis, int) else sorted(a % len(shape) for a in axis)
        self.module = bnjax.nnx.BatchNorm([shape[a] for a in axes], **fields, rngs=nnx.Rngs(0))

    def __call__(self, x, **options):
        return self.module(x, **options)

    def _state(self, kind):
        return {k: np.asarray(v[...]) for k, v in nnx.state(self.module, kind).items()}

    @property
    def stats(self):
        return self._state(nnx.BatchStat)

    @property
    def params(self):
        return self._state(nnx.Param)

    def load(self, stats):
        nnx.update(self.module, {k: nnx.BatchStat(jnp.asarray(v)) for k, v in stats.items()})

    def grad(self, loss, x, **options):
        grads = nnx.grad(lambda module: loss(module(x, **options)))(self.module)
        return {k: v[...] for k, v in grads.items()}


LAYERS = dict(linen=Linen, nnx=Nnx)
