"""Taking folded normalizations out of a model: out of its variables, and out of its run."""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict, freeze, unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax.tools._fold_pairs import Match
from bnjax.tools._layers import Call, handling, is_norm
from bnjax.tools._trees import Path

Layers = Mapping[Path, Mapping[str, jax.Array]]


def strip(variables: Any, matches: list[Match], layers: Layers) -> Any:
    """linen variables without the folded normalizations, and with kernels and biases from `layers`."""
    norms = {match.norm.path for match in matches}
    flat = flatten_dict(unfreeze(variables))
    dtypes = {names[1:-1]: leaf.dtype for names, leaf in flat.items() if names[-1] == "kernel"}
    flat = {names: leaf for names, leaf in flat.items() if names[1:-1] not in norms}
    for path in {match.layer.path for match in matches}:
        for name in ("kernel", "bias"):
            flat["params", *path, name] = layers[path][name].astype(dtypes[path])
    stripped = unflatten_dict(flat)
    return freeze(stripped) if isinstance(variables, FrozenDict) else stripped


def stripped_apply(apply_fn: Callable[..., Any], matches: list[Match]) -> Callable[..., Any]:
    """`apply_fn`, in which folded normalizations hand on their input and layers add the bias they had not."""
    norms = {match.norm.path: match.norm for match in matches}
    takers = {match.layer.path for match in matches}

    def run(call: Call) -> jax.Array:
        if is_norm(call.module):
            if call.path not in norms:
                return call.run(call.x)
            activation = getattr(call.module, "activation", None)
            return _ending(call.x, call.options.get("residual"), activation, norms[call.path].dtype)
        y = call.run(call.x)
        if call.path not in takers or call.module.use_bias:
            return y
        return y + jnp.broadcast_to(call.module.get_variable("params", "bias").astype(y.dtype), y.shape)

    key = ("stripped", tuple(sorted((path, str(site.dtype)) for path, site in norms.items())))

    @wraps(apply_fn)
    def apply(*args: Any, **kwargs: Any) -> Any:
        with handling(run, key=(key, tuple(sorted(takers)))):
            return apply_fn(*args, **kwargs)

    return apply


def _ending(
    x: jax.Array, residual: jax.Array | None, activation: Callable[[jax.Array], jax.Array] | None, dtype: Any
) -> jax.Array:
    """What a normalization does after normalising."""
    x = x if residual is None else x + residual
    return (x if activation is None else activation(x)).astype(dtype)


class Identity(nnx.Module):
    """Stands where a folded normalization stood: does what that did after normalising."""

    def __init__(self, dtype: Any, activation: Callable[[jax.Array], jax.Array] | None):
        self.dtype, self.activation = dtype, activation

    def __call__(self, x: jax.Array, *args: Any, residual: jax.Array | None = None, **kwargs: Any) -> jax.Array:
        """Returns act(x + residual)."""
        return _ending(x, residual, self.activation, self.dtype)


def strip_module(model: nnx.Module, matches: list[Match], layers: Layers) -> nnx.Module:
    """An nnx module like `model`, identities in place of the folded normalizations."""
    model = nnx.clone(model)
    modules = {tuple(map(str, path)): (path, module) for path, module in nnx.iter_modules(model)}
    for path in {match.layer.path for match in matches}:
        layer: Any = modules[path][1]
        dtype = layer.kernel[...].dtype
        layer.kernel[...] = layers[path]["kernel"].astype(dtype)
        layer.bias, layer.use_bias = nnx.Param(layers[path]["bias"].astype(dtype)), True
    for match in matches:
        where, norm = modules[match.norm.path]
        parent: Any = modules[match.norm.path[:-1]][1]
        identity = Identity(match.norm.dtype, getattr(norm, "activation", None))
        if hasattr(parent, "__setitem__"):
            parent[where[-1]] = identity
        else:
            setattr(parent, str(where[-1]), identity)
    return model
