"""The two programs of the article that this project began with, in Flax and Optax: its Keras CNN and its PyTorch CNN.

The article's text is not at hand. The originals here are the programs of its description, as such articles print them:
`experiments.article_keras` and `experiments.article_torch`. `tests/test_article.py` shows that the ports make the same
step. What differs between the two besides the framework:

- BatchNorm: Keras averages with momentum 0.99 and adds 1e-3 to the variance; PyTorch with 0.9 (its 0.1) and 1e-5, and
  its running variance is the unbiased one;
- Adam: Keras adds its epsilon (1e-7) before the second moment is debiased (:func:`keras_adam`), PyTorch (1e-8) after;
- the order of flattened channels, and so of the rows of the first Dense kernel.

Both models train as they are in `experiments.train.loop.make_train_step(port.model, port.optimizer, ...)`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from bnjax.linen import BatchNorm
from bnjax.tools import fields_from_keras, fields_from_torch, from_keras, from_torch, to_keras, to_torch
from experiments.models.convolutional import Norm, max_pool

POOLED = 5  # 28 → 26 (convolution without padding) → 13 → 11 → 5: what in_features of PyTorch's first Linear must know


class Port(NamedTuple):
    """One of the programs, ported."""

    model: nn.Module  # model.apply(variables, images, train=...) gives logits
    optimizer: optax.GradientTransformation
    load: Callable[[Mapping[str, Any]], Any]  # the original's weights, by their names there -> variables
    save: Callable[[Any], Mapping[str, Any]]  # and back


class KerasNet(nn.Module):
    """Conv → BN → ReLU → pooling, twice; Flatten; Dense → BN → ReLU; Dense. The original's softmax is in the loss."""

    widths: Sequence[int] = (32, 64)
    units: int = 128
    classes: int = 10
    norm: Norm = partial(BatchNorm, **fields_from_keras())

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """images: `[N, 28, 28, 1]` float. Returns the logits, `[N, classes]`."""
        x = _features(images, self.widths, partial(self.norm, use_running_average=not train))
        x = nn.Dense(self.units, name="fc1")(x)
        x = nn.relu(self.norm(use_running_average=not train, name="bn3")(x))
        return nn.Dense(self.classes, name="fc2")(x)


class TorchNet(nn.Module):
    """Conv → BN → ReLU → pooling, twice; flatten; Linear → ReLU; Linear. Flax finds out in_features by itself."""

    widths: Sequence[int] = (32, 64)
    units: int = 128
    classes: int = 10
    norm: Norm = partial(BatchNorm, **fields_from_torch())

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """images: `[N, 28, 28, 1]` float. Returns the logits, `[N, classes]`."""
        x = _features(images, self.widths, partial(self.norm, use_running_average=not train))
        x = nn.relu(nn.Dense(self.units, name="fc1")(x))
        return nn.Dense(self.classes, name="fc2")(x)


def _features(x: jax.Array, widths: Sequence[int], norm: Norm) -> jax.Array:
    """The convolutional part, which the programs have in common, flattened: `[N, 5 · 5 · widths[-1]]`."""
    for i, width in enumerate(widths, start=1):
        x = nn.Conv(width, (3, 3), padding="VALID", name=f"conv{i}")(x)
        x = max_pool(nn.relu(norm(name=f"bn{i}")(x)))
    return x.reshape(x.shape[0], -1)


def keras_port(widths: Sequence[int] = (32, 64), units: int = 128) -> Port:
    """The Keras program: `compile(optimizer="adam", loss="categorical_crossentropy")`."""
    model = KerasNet(widths, units)

    blank = _blank(model)
    names = {module: f"cnn/{module}" for module in blank["params"]}
    return Port(model, keras_adam(), partial(from_keras, variables=blank, names=names), partial(to_keras, names=names))


def torch_port(widths: Sequence[int] = (32, 64), units: int = 128) -> Port:
    """The PyTorch program: `CrossEntropyLoss()` and `Adam(lr=0.001)`."""
    model = TorchNet(widths, units)

    flattened = {"fc1": (widths[-1], POOLED, POOLED)}
    load = partial(from_torch, variables=_blank(model), flattened=flattened)
    return Port(model, optax.adam(1e-3, eps=1e-8), load, partial(to_torch, flattened=flattened))


def _blank(model: nn.Module) -> Any:
    return model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)), train=False)


def keras_adam(
    learning_rate: float = 1e-3, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-7
) -> optax.GradientTransformation:
    """Adam as Keras computes it: w ← w − η √(1 − β₂ᵗ) / (1 − β₁ᵗ) · m / (√v + ε).

    `optax.adam` adds ε to the debiased √v. In the first step that is an ε 32 times smaller: a weight whose gradient is
    1e-6 moves by 0.91 η there, and by 0.24 η in Keras.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return optax.ScaleByAdamState(jnp.int32(0), zeros, zeros)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        t = state.count + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, state.nu, grads)
        rate = learning_rate * jnp.sqrt(1 - b2**t) / (1 - b1**t)
        updates = jax.tree.map(lambda m, v: -rate * m / (jnp.sqrt(v) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(t, mu, nu)

    return optax.GradientTransformation(init, update)
