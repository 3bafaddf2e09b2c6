"""The Keras program of the article's section 4.1 in Flax and Optax.

What Keras does otherwise than Flax and Optax: BatchNormalization averages with momentum 0.99 and adds 1e-3 to the
variance; kernels are drawn by Glorot's uniform rule; Adam adds its epsilon before the second moment is debiased
(:func:`keras_adam`). The softmax of the original is in the loss here.
"""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from bnjax.linen import BatchNorm
from bnjax.tools import from_keras, to_keras

DEFAULTS = dict(momentum=0.99, epsilon=1e-3)  # of keras.layers.BatchNormalization
NAMES = {
    "Conv_0": "sequential/conv2d",
    "BatchNorm_0": "sequential/batch_normalization",
    "Dense_0": "sequential/dense",
}


class KerasNet(nn.Module):
    """Conv 3×3 with ReLU → BatchNorm → max-pool 2×2 → flatten → Dense.

    `bn_first` puts the ReLU behind the BatchNorm, where the article's section 2.1 has it; its program does not.
    """

    bn_first: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """images: `[N, 28, 28, 1]` float. Returns the logits, `[N, 10]`."""
        glorot = nn.initializers.glorot_uniform()
        norm = BatchNorm(use_running_average=not train, **DEFAULTS)
        x = nn.Conv(32, (3, 3), padding="VALID", kernel_init=glorot)(images)
        x = nn.relu(norm(x)) if self.bn_first else norm(nn.relu(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        return nn.Dense(10, kernel_init=glorot)(x.reshape(len(x), -1))


MODEL = KerasNet()


@cache
def _blank() -> Any:
    return MODEL.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)), train=False)


def load(weights: Any) -> Any:
    """Returns the variables of the port for the original's weights by path, `{"sequential/conv2d/kernel": ...}`."""
    return from_keras(weights, _blank(), names=NAMES)


def save(variables: Any) -> Any:
    """Returns the original's weights by path for the variables of the port."""
    return to_keras(variables, names=NAMES)


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


OPTIMIZER = keras_adam()
