"""PyTorch state dicts to variables and back: names, layouts, and what the words mean."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bnjax.tools import _trees
from bnjax.tools.convert._correspondence import Array, Dialect, Leaf, filled, key_of, leaves_of

_TORCH = Dialect(
    library="PyTorch",
    separator=".",
    norm={
        "scale": "weight",
        "bias": "bias",
        "mean": "running_mean",
        "var": "running_var",
        "steps": "num_batches_tracked",
    },
    weight={"kernel": "weight", "embedding": "weight", "bias": "bias"},
)


def from_torch(
    state: Mapping[str, Any],
    variables: Any,
    *,
    names: Mapping[str, str] | None = None,
    flattened: Mapping[str, Sequence[int]] | None = None,
    transposed: Sequence[str] = (),
) -> Any:
    r"""Variables with the values of a PyTorch `state_dict`.

    .. math:: K_{h,w,i,o} = W_{o,i,h,w}, \qquad \mathrm{scale}, \mathrm{bias}, \mathrm{mean}, \mathrm{var} =
              \mathtt{weight}, \mathtt{bias}, \mathtt{running\_mean}, \mathtt{running\_var}

    PyTorch's `running_var` is divided by n − 1 where Flax's is divided by n; it is taken as it is, and
    `unbiased_var=True` goes on averaging it in that way. See :func:`fields_from_torch` for momentum and epsilon, which
    a state dict does not hold. Padding is not in it either: `nn.Conv(..., padding=1, stride=2)` of PyTorch is
    `padding=((1, 1), (1, 1))` in Flax, never `"SAME"`.

    Args:
      state: `[...]` arrays by name: a `state_dict` (tensors or arrays), or :func:`read_arrays` of a file.
      variables: what to fill: linen variables, an nnx state or an nnx module, of the shapes of the same network.
      names: which module of `variables` has which prefix in `state`: `{"Conv_0": "features.0", "block/bn": "l1.bn"}`.
        By default the path with `.` for `/`.
      flattened: dense layers that read flattened channels, by path: the shape `(C, H, W)` before flattening. PyTorch
        flattens channels first, Flax last.
      transposed: paths of transposed convolutions, whose kernels are mirrored; those of one group.

    Returns:
      `variables` with all its leaves from `state`, in their own dtypes; `num_batches_tracked` goes where steps are
      counted.

    Raises:
      ValueError: names or shapes that do not correspond, in either direction: nothing is left out in silence;
        a running variance that is negative or not finite.

    Examples:
      >>> import jax, jax.numpy as jnp, numpy as np, flax.linen as nn, bnjax
      >>> from bnjax import tools
      >>> norm = bnjax.linen.BatchNorm(use_running_average=True, **tools.fields_from_torch())
      >>> variables = norm.init(jax.random.key(0), jnp.ones((1, 2)))
      >>> state = {"bn.weight": np.ones(2), "bn.bias": np.zeros(2), "bn.running_mean": np.array([1.0, 2.0]),
      ...          "bn.running_var": np.ones(2), "bn.num_batches_tracked": np.array(7)}
      >>> tools.from_torch(state, variables, names={"": "bn"})["batch_stats"]["mean"]
      Array([1., 2.], dtype=float32)
    """
    tree = _trees.flatten_with_layers(variables)
    leaves = leaves_of(tree, _TORCH, names or {})
    counted = {leaf.key for leaf in leaves if leaf.role == "steps"}
    state = {key: v for key, v in state.items() if key in counted or not key.endswith("num_batches_tracked")}

    def convert(value: Array, leaf: Leaf) -> Array:
        if leaf.role == "steps":
            return np.broadcast_to(value, leaf.shape)
        return _to_flax(value, leaf, (flattened or {}).get(leaf.module), transposed)

    return filled(tree, leaves, state, convert)


def to_torch(
    variables: Any,
    *,
    names: Mapping[str, str] | None = None,
    flattened: Mapping[str, Sequence[int]] | None = None,
    transposed: Sequence[str] = (),
) -> dict[str, Array]:
    r"""A PyTorch `state_dict` with the values of variables: the inverse of :func:`from_torch`.

    .. math:: W_{o,i,h,w} = K_{h,w,i,o}

    Args:
      variables: linen variables, an nnx state or an nnx module, of any shapes.
      names: as in :func:`from_torch`.
      flattened: as in :func:`from_torch`.
      transposed: as in :func:`from_torch`.

    Returns:
      NumPy arrays by name; `module.load_state_dict({k: torch.tensor(v) for k, v in ....items()})` takes them. Each
      normalization has its `num_batches_tracked`, 0 where no steps are counted.

    Raises:
      ValueError: no statistics in the tree, or names that are not of its modules.

    Examples:
      >>> import jax.numpy as jnp
      >>> from bnjax import tools
      >>> stats = {"batch_stats": {"bn": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}}
      >>> sorted(tools.to_torch(stats))
      ['bn.num_batches_tracked', 'bn.running_mean', 'bn.running_var']
    """
    tree = _trees.flatten_with_layers(variables)
    state: dict[str, Array] = {}
    for leaf, value in zip(leaves_of(tree, _TORCH, names or {}), tree.leaves, strict=True):
        state[leaf.key] = _to_torch(np.asarray(value), leaf, (flattened or {}).get(leaf.module), transposed)
    for layer in tree.layers:
        state.setdefault(key_of(layer, "steps", _TORCH, names or {}, norm=True), np.zeros((), np.int64))
    return state


def fields_from_torch(momentum: float | None = 0.1, eps: float = 1e-5) -> dict[str, Any]:
    r"""The fields of `bnjax.BatchNorm` for the arguments of `torch.nn.BatchNorm2d`.

    .. math:: \mathrm{momentum} = 1 - \mathrm{momentum}_\text{torch}

    Args:
      momentum: PyTorch's: the weight of the NEW value, or None for the plain average.
      eps: PyTorch's epsilon.

    Returns:
      `momentum`, `epsilon` and `unbiased_var`.

    Raises:
      ValueError: momentum outside [0, 1].

    Examples:
      >>> from bnjax import tools
      >>> tools.fields_from_torch(momentum=0.25)
      {'momentum': 0.75, 'epsilon': 1e-05, 'unbiased_var': True}
    """
    if momentum is not None and not 0 <= momentum <= 1:
        raise ValueError(f"PyTorch's momentum is the weight of the NEW value and must be in [0, 1]; got {momentum}.")
    return dict(momentum=None if momentum is None else 1 - momentum, epsilon=eps, unbiased_var=True)


def _to_flax(value: Array, leaf: Leaf, chw: Sequence[int] | None, transposed: Sequence[str]) -> Array:
    if leaf.role != "kernel" or value.ndim < 2:
        return value
    if value.ndim == 2:
        value = value.T  # [out, in] → [in, out]
        return value if chw is None else _channels_last(value, leaf, chw)
    spatial = tuple(range(2, value.ndim))
    if leaf.module in transposed:  # [in, out, ...], as the derivative of a convolution: mirrored
        return np.flip(value.transpose(*spatial, 0, 1), tuple(range(value.ndim - 2)))
    return value.transpose(*spatial, 1, 0)


def _channels_last(value: Array, leaf: Leaf, chw: Sequence[int]) -> Array:
    """The rows of a kernel in the order in which Flax flattens the positions."""
    if len(value) != math.prod(chw):
        raise ValueError(
            f"{leaf.key} reads {len(value)} inputs (PyTorch's in_features), and flattened={tuple(chw)} makes "
            f"{math.prod(chw)}: give (C, H, W) as it is before flattening, or mend in_features."
        )
    return np.moveaxis(value.reshape(*chw, -1), 0, -2).reshape(value.shape)


def _to_torch(value: Array, leaf: Leaf, chw: Sequence[int] | None, transposed: Sequence[str]) -> Array:
    if leaf.role == "steps":
        return np.asarray(value.max(initial=0), np.int64)
    if leaf.role != "kernel" or value.ndim < 2:
        return value
    if value.ndim == 2:
        if chw is not None:
            c, *hw = chw
            value = np.moveaxis(value.reshape(*hw, c, -1), -2, 0).reshape(value.shape)
        return value.T
    spatial = tuple(range(value.ndim - 2))
    if leaf.module in transposed:
        return np.flip(value, spatial).transpose(-2, -1, *spatial)
    return value.transpose(-1, -2, *spatial)
