"""Keras' weights as people have them: models, files of several versions, layers that keep more than Flax's."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bnjax.tools.convert._correspondence import Array, Leaf
from bnjax.tools.convert._torch_state import array_of as torch_array_of

# Batch renormalization trains by averages of its own; evaluation needs none of them.
_RENORM = ("moving_stddev", "renorm_mean", "renorm_stddev")
SEPARABLE = ("depthwise_kernel", "pointwise_kernel")  # the first alone in depthwise layers of older versions
_ORDER = ("scale", "bias", "mean", "var", "steps")  # in which Keras numbers the variables of a normalization


def weights_of(state: Any) -> dict[str, Any]:
    """Returns the weights by path: of a model, or of a mapping, without the `:0` of older versions and seeds."""
    if isinstance(state, Mapping):
        named = [(str(key).removesuffix(":0"), value) for key, value in state.items()]
    elif hasattr(state, "weights"):
        named = [(w.path, w) for w in state.weights]
    else:
        raise ValueError(
            f"state must be a Keras model or arrays by name; got {type(state).__name__}. Files are read by read_arrays."
        )
    weights = {name: value for name, value in named if "seed_generator" not in name}
    if len(weights) < sum("seed_generator" not in name for name, _ in named):
        raise ValueError("two weights of state have one name: give the layers of the model names of their own.")
    return weights


def transposed_of(state: Any) -> dict[str, bool]:
    """Returns the convolutions of a Keras model by name, and whether each is transposed; of anything else nothing."""
    known = {}
    for layer in [] if isinstance(state, Mapping) else getattr(state, "_flatten_layers", list)():
        classes = {c.__name__ for c in type(layer).__mro__}
        if classes & {"BaseConv", "BaseConvTranspose", "BaseDepthwiseConv"} and layer.weights:
            known[layer.weights[0].path.rpartition("/")[0]] = "BaseConvTranspose" in classes
    return known


def array_of(name: str, value: Any) -> Array:
    """Returns a Keras variable, of any backend, as an array."""
    value = getattr(value, "value", value)
    value = value() if callable(value) else value  # a method in TensorFlow
    return torch_array_of(name, value) if hasattr(value, "detach") else np.asarray(value)


def keyed(leaves: Sequence[Leaf], state: Mapping[str, Any]) -> list[Leaf]:
    """Returns the leaves by the names that `state` has for them.

    A kernel is called `depthwise_kernel` in layers of older versions, and a separable convolution, two modules in Flax,
    has a `pointwise_kernel` too. The files of Keras 3 number the variables of a layer: `conv/vars/0`.
    """
    layers: dict[str, list[Leaf]] = {}
    for leaf in leaves:
        layers.setdefault(leaf.key.rpartition("/")[0], []).append(leaf)
    return [leaf for name, held in layers.items() for leaf in _renamed(name, held, state)]


def separable(leaves: Sequence[Leaf]) -> list[Leaf]:
    """Returns the leaves, the kernels of two modules of one name called as those of a separable convolution."""
    kernels: dict[str, list[Leaf]] = {}
    for leaf in leaves:
        if leaf.role == "kernel":
            kernels.setdefault(leaf.key, []).append(leaf)
    new: dict[int, str] = {}
    for key, two in kernels.items():
        if len(two) == 2 and _are_separable(*_depthwise_first(two)):
            name = key.removesuffix("kernel")
            new |= {leaf.at: name + word for leaf, word in zip(_depthwise_first(two), SEPARABLE, strict=True)}
    return [leaf._replace(key=new.get(leaf.at, leaf.key)) for leaf in leaves]


def _are_separable(depthwise: Leaf, pointwise: Leaf) -> bool:
    one, other = depthwise.shape, pointwise.shape
    return len(one) == len(other) > 2 and one[-2] == 1 and math.prod(other[:-2]) == 1 and one[-1] == other[-2]


def convolutions_of(leaves: Sequence[Leaf]) -> dict[str, bool]:
    """Returns the modules that must be convolutions, none of them transposed: depthwise and separable ones."""
    kernels = [leaf for leaf in leaves if leaf.role == "kernel"]
    layers = Counter(_layer_of(leaf) for leaf in kernels)
    return {k.module: False for k in kernels if k.key.endswith(SEPARABLE) or layers[_layer_of(k)] == 2}


def _layer_of(leaf: Leaf) -> str:
    return leaf.key.rpartition("/")[0].removesuffix("/vars")


def without_renorm(state: Mapping[str, Any], leaves: Sequence[Leaf]) -> dict[str, Any]:
    """Returns the state without the averages of batch renormalization that Flax's layers do not keep."""
    norms = {leaf.key.rpartition("/")[0] for leaf in leaves if leaf.normalises}
    spare = {f"{name}/{word}" for name in norms for word in _RENORM}
    for name in norms:  # numbered: three more than there are leaves
        ours = sum(leaf.key.startswith(f"{name}/") and leaf.role != "steps" for leaf in leaves)
        if f"{name}/vars/{ours + 2}" in state:
            spare |= {f"{name}/vars/{ours + i}" for i in range(len(_RENORM))}
    return {key: value for key, value in state.items() if key not in spare}


def _renamed(name: str, held: list[Leaf], state: Mapping[str, Any]) -> list[Leaf]:
    if f"{name}/vars/0" in state:
        return _numbered(name, held)
    kernels = [leaf for leaf in held if leaf.role == "kernel" and leaf.key not in state]
    words = [word for word in SEPARABLE if f"{name}/{word}" in state]
    if not words or len(kernels) != len(words):
        return held
    kernels = _depthwise_first(kernels)
    new = {leaf.at: f"{name}/{word}" for leaf, word in zip(kernels, words, strict=True)}
    return [leaf._replace(key=new.get(leaf.at, leaf.key)) for leaf in held]


def _numbered(name: str, held: list[Leaf]) -> list[Leaf]:
    if held[0].normalises:
        if len({leaf.role for leaf in held} & {"scale", "bias"}) == 1:
            raise ValueError(
                f"{name} numbers its variables, so that a layer with a scale and one with a bias look alike: read a "
                ".keras file, which names them, or give the weights by name."
            )
        ordered = sorted(held, key=lambda leaf: _ORDER.index(leaf.role))  # steps, which Keras has not, come last
    else:
        ordered = _depthwise_first([leaf for leaf in held if leaf.role != "bias"])
        ordered += [leaf for leaf in held if leaf.role == "bias"]
    return [leaf if leaf.role == "steps" else leaf._replace(key=f"{name}/vars/{i}") for i, leaf in enumerate(ordered)]


def _depthwise_first(kernels: list[Leaf]) -> list[Leaf]:
    """Sorts the kernels of one separable convolution: the pointwise one has no extent."""
    return sorted(kernels, key=lambda leaf: math.prod(leaf.shape[:-2]) == 1)
