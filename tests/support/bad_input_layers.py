"""Builds layers from rows of bad_inputs.py: each function returns `run(x, **data) -> {y, mean, var}`.

`data` are the row's arrays besides x (mask, mean, var), for callers who want them traced. The modules may be bnjax's or
Flax's, which have the same fields.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import bnjax


def fields(case):
    """Returns the fields that all modules share."""
    usual = dict(axis=case.axis, epsilon=case.epsilon, momentum=case.momentum, dtype=case.dtype)
    return usual | dict(use_scale=case.affine, use_bias=case.affine)


def functional(case):
    def run(x, **data):
        held = case.variables | data
        options = dict(axis=case.axis, epsilon=case.epsilon, dtype=case.dtype)
        affine = dict(scale=held.get("scale"), bias=held.get("bias"))
        options |= dict(mask=data.get("mask", case.mask))
        mean, var = held["mean"], held["var"]
        if not case.train:
            return dict(y=bnjax.normalize(x, mean, var, **affine, **options), mean=mean, var=var)
        y, moments = bnjax.batch_norm(x, **affine, **options)
        running = bnjax.update_running(bnjax.RunningStats(mean, var), moments, momentum=case.momentum)
        return dict(y=y, mean=running.mean, var=running.var)

    return run


def linen(case, module=bnjax.linen.BatchNorm, stack=lambda v: v, call=None, **own):
    """Builds a linen layer; `stack` adapts a layer's variables to the module, `own` are extra fields, `call` extra
    arguments.
    """
    layer = module(use_running_average=not case.train, **fields(case), **own)

    def run(x, **data):
        held = {k: stack(v) for k, v in (case.variables | data).items() if k != "mask"}
        stats = {k: held.pop(k) for k in ("mean", "var")}
        options = dict(mask=data.get("mask", case.mask), mutable=["batch_stats"], **call or {})
        y, updates = layer.apply({"params": held, "batch_stats": stats}, x, **options)
        return dict(y=y, **{k: updates.get("batch_stats", stats)[k] for k in ("mean", "var")})

    return run


def nnx_module(case, module=bnjax.nnx.BatchNorm, stack=lambda v: v, call=None, **own):
    def run(x, **data):
        layer = module(
            int(np.prod(case.channels)), use_running_average=not case.train, rngs=nnx.Rngs(0), **fields(case), **own
        )
        for name, value in (case.variables | data).items():
            if name != "mask":
                kind = nnx.BatchStat if name in ("mean", "var") else nnx.Param
                value = stack(value)
                nnx.update(layer, {name: kind(value if isinstance(value, np.ndarray) else jnp.asarray(value))})
        y = layer(x, mask=data.get("mask", case.mask), **call or {})
        return dict(y=y, mean=layer.mean[...], var=layer.var[...])

    return run


APIS = dict(functional=functional, linen=linen, nnx=nnx_module)


def traced(run, x, how, **data):
    """Calls run(x) eagerly, under jit, or for its shapes alone.

    Arguments that are not arrays are constants of the trace.
    """
    if how == "eager":
        return run(x, **data)
    transform = jax.jit if how == "jit" else lambda f: lambda *args: jax.eval_shape(f, *args)
    if type(x) is np.ndarray and x.dtype.isnative and jnp.issubdtype(x.dtype, jnp.number):
        return transform(lambda x, data: run(x, **data))(x, data)
    return transform(lambda data: run(x, **data))(data)
