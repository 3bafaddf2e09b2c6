"""What Haiku keeps of a network: its moving averages with their counters, and its layouts of kernels."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from bnjax.tools.convert._correspondence import Array, Leaf
from bnjax.tools.convert._fill import reshaped
from bnjax.tools.convert._kernels import Kernels

Nested = Mapping[str, Mapping[str, Any]]


_AVERAGES = ("mean_ema", "var_ema")


# 1 − dⁿ is 1 in float32 for every d < 1 that float32 can tell from 1; and 2³⁰ steps more still fit the int32.
_DEBIASED = 2**30


def check_decay(decay_rate: float | None) -> None:
    if decay_rate is None or not 0 <= decay_rate < 1:
        raise ValueError(f"Haiku's decay_rate is the weight of the OLD value and must be in [0, 1); got {decay_rate}.")


def flat(nested: Nested) -> dict[str, Any]:
    return {f"{module}/{name}": value for module, held in nested.items() for name, value in held.items()}


def averages(state: Nested, counters: set[str]) -> dict[str, Any]:
    """Returns the state by key without what the averages make redundant: `hidden`, counters nobody asks for."""
    derived = {f"{m}/{name}" for m in state if m.endswith(_AVERAGES) for name in ("hidden", "counter")}
    return {key: value for key, value in flat(state).items() if key in counters or key not in derived}


def variances(state: Nested) -> dict[str, Array]:
    """Returns the variances, with those that rounding made negative as 0; those further below are refused later."""
    values = {}
    for module, held in state.items():
        norm, _, name = module.rpartition("/")
        beside = state.get(f"{norm}/mean_ema", {})
        if name == "var_ema" and "average" in held and "average" in beside:
            var, mean = np.asarray(held["average"]), np.asarray(beside["average"])
            rounding = 100 * float(jnp.finfo(var.dtype).eps) * mean**2
            values[f"{module}/average"] = np.where((var < 0) & (var >= -rounding), 0, var).astype(var.dtype)
    return values


def to_flax_axes(value: Array, leaf: Leaf, kernels: Kernels) -> Array:
    if leaf.role == "steps":
        return np.broadcast_to(value, leaf.shape)
    if leaf.role != "kernel" or value.ndim < 3:
        return value
    return kernels.chosen(leaf, _plain(value, leaf, kernels), _turned(value, leaf, kernels), leaf.shape)


def _plain(value: Array, leaf: Leaf, kernels: Kernels) -> Array:
    """Returns a kernel whose axes are in the same order in both: a transposed one is then of `transpose_kernel`."""
    return _flipped(value) if kernels.is_named_transposed(leaf.module) else value


def _turned(value: Array, leaf: Leaf, kernels: Kernels) -> Array:
    """Returns a kernel, read as that of a transposed convolution: Haiku stores [..., out, in], not mirrored."""
    return _flipped(value) if kernels.stores_transposed(leaf.module) else value.swapaxes(-1, -2)


def _flipped(value: Array) -> Array:
    return np.flip(value, tuple(range(value.ndim - 2)))


def to_haiku_axes(value: Array, leaf: Leaf, like: Any, kernels: Kernels) -> Array:
    if leaf.role == "steps":
        return np.asarray(value.max(initial=0), like.dtype)
    if leaf.role == "kernel" and value.ndim > 2:
        value = kernels.chosen(leaf, _plain(value, leaf, kernels), _turned(value, leaf, kernels), tuple(like.shape))
    value = reshaped(value, like.shape)
    if value.shape != like.shape:
        raise ValueError(f"{leaf.module}/{leaf.role} has shape {leaf.shape}; {leaf.key} has {like.shape} in Haiku.")
    return value.astype(like.dtype)


def ema(
    module: str, held: Mapping[str, Any], values: Mapping[str, Array], decay_rate: float | None
) -> dict[str, Array]:
    """Returns one module of Haiku's state; that of an average is made of the average and its steps."""
    if not module.endswith(_AVERAGES):
        return {name: values[f"{module}/{name}"] for name in held}
    norm, _, _ = module.rpartition("/")
    average, steps = values[f"{module}/average"], values.get(f"{norm}/mean_ema/counter")
    if steps is None:
        return {"average": average, "hidden": average, "counter": np.asarray(_DEBIASED, held["counter"].dtype)}
    check_decay(decay_rate)
    share = 1 - float(np.asarray(decay_rate, average.dtype)) ** int(steps)  # 1 − dᵗ for the d that Haiku computes with
    return {"average": average, "hidden": (share * average).astype(average.dtype), "counter": steps}
