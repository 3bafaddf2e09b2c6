"""PyTorch's states as people have them: modules, nested checkpoints, tensors of any kind, wrappers' prefixes."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from bnjax.tools.convert._correspondence import Array

_WRAPPERS = ("module.", "_orig_mod.")  # DataParallel and DistributedDataParallel, and torch.compile


def tensors_of(state: Any) -> dict[str, Any]:
    """Returns the tensors by name: of a module, a state dict, or a checkpoint that holds one beside other things."""
    if _is_module(state):
        return dict(state.state_dict())
    if not isinstance(state, Mapping):
        raise ValueError(
            f"state must be a state_dict, a torch module, or arrays by name; got {type(state).__name__}. read_arrays "
            "reads files."
        )
    inside = {key: value for key, value in state.items() if _is_module(value) or _is_state(value)}
    if not inside:
        return dict(state)
    if "state_dict" not in inside and len(inside) > 1:
        one = next(iter(inside))
        raise ValueError(f"state holds several states, {list(inside)}: give one, such as state[{one!r}].")
    return tensors_of(inside.get("state_dict", next(iter(inside.values()))))


def transposed_of(state: Any) -> dict[str, bool]:
    """Returns the convolutions of a torch module by name, and whether each is transposed; of anything else nothing."""
    if isinstance(state, Mapping):
        modules = [value for value in state.values() if _is_module(value)]
        return transposed_of(modules[0]) if len(modules) == 1 else {}
    classes = (
        {name: {c.__name__ for c in type(m).__mro__} for name, m in state.named_modules()} if _is_module(state) else {}
    )
    return {name: "_ConvTransposeNd" in known for name, known in classes.items() if "_ConvNd" in known}


def wrapper_of(keys: Iterable[str], ours: Iterable[str]) -> str:
    """Returns the prefix that wrappers of PyTorch put before all names, where the variables' own names have none."""
    keys, ours, prefix = list(keys), list(ours), ""
    while keys and (found := next((w for w in _WRAPPERS if all(key.startswith(prefix + w) for key in keys)), "")):
        if any(key.startswith(prefix + found) for key in ours):
            break
        prefix += found
    return prefix


def array_of(name: str, value: Any) -> Array:
    """Returns a tensor, on any device and with or without a gradient, as an array; dtypes NumPy lacks as float32."""
    if not hasattr(value, "detach"):
        return np.asarray(value)
    if value.is_meta:
        raise ValueError(f"{name} is a tensor on the device meta, which holds no values: load them first.")
    value = value.to_dense() if value.is_sparse else value.dequantize() if value.is_quantized else value
    try:
        return value.numpy(force=True)
    except TypeError:  # bfloat16 and the kinds of float8, whose values float32 holds exactly
        return value.float().numpy(force=True)


def _is_module(value: Any) -> bool:
    return hasattr(value, "state_dict") and hasattr(value, "named_modules")


def _is_state(value: Any) -> bool:
    """Returns whether a value is a state dict: arrays by name, at least one."""
    if not isinstance(value, Mapping) or not value:
        return False
    return all(hasattr(v, "shape") and hasattr(v, "dtype") for v in value.values())
