"""Taking folded normalizations out of a model: out of its variables, and out of its run."""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict, freeze, meta, unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax.tools._fold._pairs import Match
from bnjax.tools._layers import Call, handling, is_norm
from bnjax.tools._trees import Path, is_box

Layers = Mapping[Path, Mapping[str, jax.Array]]


def strip(variables: Any, matches: list[Match], layers: Layers) -> Any:
    """Returns linen variables without the folded normalizations, and with kernels and biases from `layers`."""
    norms = {match.norm.path for match in matches}
    flat = flatten_dict(unfreeze(variables), is_leaf=lambda _, node: is_box(node))
    flat = {names: leaf for names, leaf in flat.items() if names[1:-1] not in norms}
    for match in matches:
        path = match.layer.path
        kernel = flat["params", *path, "kernel"]
        new = {name: layers[path][name].astype(meta.unbox(kernel).dtype) for name in ("kernel", "bias")}
        flat["params", *path, "bias"] = _boxed(flat.get(("params", *path, "bias")), kernel, new["bias"], match)
        flat["params", *path, "kernel"] = meta.replace_boxed(kernel, new["kernel"])
    stripped = unflatten_dict(flat)
    return freeze(stripped) if isinstance(variables, FrozenDict) else stripped


def _boxed(old: Any, kernel: Any, bias: jax.Array, match: Match) -> Any:
    """Returns the bias in the box that it had, or in one with the names of the kernel's stacked and output axes."""
    if old is not None:
        return meta.replace_boxed(old, bias)
    if not isinstance(kernel, nn.Partitioned):
        return bias
    names = _bias_names(kernel.names, bias.ndim, match)
    return kernel.replace(value=bias, names=names)


def _bias_names(names: Any, rank: int, match: Match) -> tuple[Any, ...]:
    """Returns, of the names of a kernel's axes, those of its stacked axes and of its outputs."""
    site: Any = match.layer.layer
    return (*names[: rank - 1], names[site.out_axis])


def stripped_apply(apply_fn: Callable[..., Any], matches: list[Match]) -> Callable[..., Any]:
    """Returns `apply_fn` with normalizations that hand on their input and layers that add the bias they had not."""
    norms = {match.norm.path: match.norm for match in matches}
    takers = {match.layer.path for match in matches}

    def run(call: Call) -> jax.Array:
        if is_norm(call.module):
            return call.x.astype(norms[call.path].dtype) if call.path in norms else call.run(call.x)
        y = call.run(call.x)
        if call.path not in takers or call.module.use_bias:
            return y
        bias = meta.unbox(call.module.get_variable("params", "bias"))
        return y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)

    key = ("stripped", tuple(sorted((path, str(site.dtype)) for path, site in norms.items())))

    @wraps(apply_fn)
    def apply(*args: Any, **kwargs: Any) -> Any:
        with handling(run, key=(key, tuple(sorted(takers)))):
            return apply_fn(*args, **kwargs)

    return apply


class Identity(nnx.Module):
    """Stands where a folded normalization stood: returns its input, in the dtype that came out there."""

    def __init__(self, dtype: Any):
        self.dtype = dtype

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """Returns x."""
        return x.astype(self.dtype)


def strip_module(model: nnx.Module, matches: list[Match], layers: Layers) -> nnx.Module:
    """Returns an nnx module like `model`, identities in place of the folded normalizations."""
    model = nnx.clone(model)
    modules = {tuple(map(str, path)): (path, module) for path, module in nnx.iter_modules(model)}
    for match in matches:
        path = match.layer.path
        layer: Any = modules[path][1]
        dtype = layer.kernel[...].dtype
        if layer.bias is None:
            layer.bias, layer.use_bias = nnx.Param(layers[path]["bias"].astype(dtype)), True
            if names := layer.kernel.get_metadata().get("out_sharding"):
                layer.bias.set_metadata(out_sharding=_bias_names(names, layer.bias[...].ndim, match))
        layer.kernel[...], layer.bias[...] = (layers[path][name].astype(dtype) for name in ("kernel", "bias"))
    for match in matches:
        where = modules[match.norm.path][0]
        parent: Any = modules[match.norm.path[:-1]][1]
        if hasattr(parent, "__setitem__"):
            parent[where[-1]] = Identity(match.norm.dtype)
        else:
            setattr(parent, str(where[-1]), Identity(match.norm.dtype))
    return model
