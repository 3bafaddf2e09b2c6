"""Keras weights to variables and back: names, layouts, and what the words mean."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bnjax.tools import _trees
from bnjax.tools.convert._correspondence import Array, Dialect, Leaf, filled, leaves_of

_KERAS = Dialect(
    library="Keras",
    separator="/",
    norm={"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"},
    weight={"kernel": "kernel", "embedding": "embeddings", "bias": "bias"},
)


def from_keras(
    state: Mapping[str, Any],
    variables: Any,
    *,
    names: Mapping[str, str] | None = None,
    transposed: Sequence[str] = (),
) -> Any:
    r"""Variables with the values of a Keras model.

    .. math:: \mathrm{scale}, \mathrm{bias}, \mathrm{mean}, \mathrm{var} =
              \mathtt{gamma}, \mathtt{beta}, \mathtt{moving\_mean}, \mathtt{moving\_variance}

    Kernels have one layout in both, but for depthwise ones (`[h, w, in, multiplier]` becomes `[h, w, 1, out]`) and
    those of transposed convolutions. momentum means the same; Keras' default epsilon is 1e-3: see
    :func:`fields_from_keras`.

    Args:
      state: arrays of any shapes by name: `{w.path: w.numpy() for w in model.weights}`.
      variables: what to fill: linen variables, an nnx state or an nnx module, of the same network.
      names: which module of `variables` has which name in `state`: `{"BatchNorm_0": "batch_normalization"}`. By default
        the path.
      transposed: paths of transposed convolutions, whose kernels are mirrored.

    Returns:
      `variables` with all its leaves from `state`, in their own dtypes.

    Raises:
      ValueError: names or shapes that do not correspond, in either direction: nothing is left out in silence;
        a running variance that is negative or not finite.

    Examples:
      >>> import numpy as np, jax.numpy as jnp
      >>> from bnjax import tools
      >>> variables = {"batch_stats": {"bn": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}}
      >>> state = {"batch_normalization/moving_mean": np.ones(2), "batch_normalization/moving_variance": np.ones(2)}
      >>> tools.from_keras(state, variables, names={"bn": "batch_normalization"})["batch_stats"]["bn"]["mean"]
      Array([1., 1.], dtype=float32)
    """
    tree = _trees.flatten_with_layers(variables)

    def convert(value: Array, leaf: Leaf) -> Array:
        if leaf.role == "kernel" and leaf.module in transposed:
            return _mirrored(value)
        if leaf.role == "kernel" and value.ndim > 2 and leaf.shape[-2] == 1 and value.shape[-2] > 1:  # depthwise
            return value.reshape(*value.shape[:-2], 1, -1)
        return value

    return filled(tree, leaves_of(tree, _KERAS, names or {}), state, convert)


def to_keras(
    variables: Any,
    *,
    names: Mapping[str, str] | None = None,
    transposed: Sequence[str] = (),
    depthwise: Mapping[str, int] | None = None,
) -> dict[str, Array]:
    r"""The values of variables by the names of Keras: the inverse of :func:`from_keras`.

    .. math:: \mathtt{gamma}, \mathtt{beta}, \mathtt{moving\_mean}, \mathtt{moving\_variance} =
              \mathrm{scale}, \mathrm{bias}, \mathrm{mean}, \mathrm{var}

    Args:
      variables: linen variables, an nnx state or an nnx module, of any shapes.
      names: as in :func:`from_keras`.
      transposed: as in :func:`from_keras`.
      depthwise: the multiplier of the convolutions that are a `DepthwiseConv` in Keras, by path.

    Returns:
      NumPy arrays by name; `for w in model.weights: w.assign(state[w.path])` takes them.

    Raises:
      ValueError: no statistics in the tree, names that are not of its modules, or leaves that Keras does not have
        (`steps`).

    Examples:
      >>> import jax.numpy as jnp
      >>> from bnjax import tools
      >>> sorted(tools.to_keras({"batch_stats": {"bn": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}}))
      ['bn/moving_mean', 'bn/moving_variance']
    """
    tree = _trees.flatten_with_layers(variables)
    state: dict[str, Array] = {}
    for leaf, array in zip(leaves_of(tree, _KERAS, names or {}), tree.leaves, strict=True):
        value = np.asarray(array)
        if leaf.role == "kernel" and leaf.module in transposed:
            value = _mirrored(value)
        elif leaf.role == "kernel" and leaf.module in (depthwise or {}):
            value = value.reshape(*value.shape[:-2], -1, (depthwise or {})[leaf.module])
        state[leaf.key] = value
    return state


def fields_from_keras(momentum: float = 0.99, epsilon: float = 1e-3) -> dict[str, Any]:
    r"""The fields of `bnjax.BatchNorm` for the arguments of `keras.layers.BatchNormalization`.

    .. math:: \mathrm{momentum} = \mathrm{momentum}_\text{Keras}, \quad \epsilon = \epsilon_\text{Keras}

    Args:
      momentum: Keras': the weight of the OLD value.
      epsilon: Keras' epsilon; its default is 1e-3, Flax's 1e-5.

    Returns:
      `momentum` and `epsilon`.

    Raises:
      ValueError: momentum outside [0, 1].

    Examples:
      >>> from bnjax import tools
      >>> tools.fields_from_keras()
      {'momentum': 0.99, 'epsilon': 0.001}
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"Keras' momentum is the weight of the OLD value and must be in [0, 1]; got {momentum}.")
    return dict(momentum=momentum, epsilon=epsilon)


def _mirrored(kernel: Array) -> Array:
    """[..., out, in], as the derivative of a convolution, to [..., in, out], as a convolution; and back."""
    return np.flip(kernel.swapaxes(-1, -2), tuple(range(kernel.ndim - 2)))
