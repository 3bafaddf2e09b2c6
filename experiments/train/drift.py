"""How far each batch lies from the running statistics that evaluation would use in its place."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

Layers = dict[str, dict[str, jax.Array]]


def drift(before: Mapping[str, Any], after: Mapping[str, Any], *, momentum: float, epsilon: float) -> Layers:
    """The distance between batch and running statistics, per normalisation layer, as two numbers.

    With the running statistics μ, σ² before the step and the batch's m, v:

        mean = √ mean_c (m − μ)² / (σ² + ε)             in standard deviations
        var  = √ mean_c (log((v + ε) / (σ² + ε)))²      in nepers: 0.1 is 10 %

    The batch moments cost no pass of their own: the update `new = momentum·old + (1 − momentum)·m` gives
    `m = (new − momentum·old) / (1 − momentum)`. Its rounding error, about 1e-7 / (1 − momentum) of μ, is far below any
    drift worth plotting. A channel whose update was withheld (a batch that is not finite) reads as no drift.

    Args:
        before: the `batch_stats` collection before the step.
        after: the collection after it.
        momentum: of the layers, below one.
        epsilon: of the layers.

    Returns:
        `{layer: {"mean": [], "var": []}}`, float32.
    """
    old, new = flatten_dict(dict(before), sep="/"), flatten_dict(dict(after), sep="/")
    layers = sorted(name.removesuffix("/mean") for name in old if name.endswith("/mean"))

    def batch(name: str) -> jax.Array:
        return (new[name] - momentum * old[name]) / (1 - momentum)

    def distances(layer: str) -> dict[str, jax.Array]:
        var = old[f"{layer}/var"] + epsilon
        batch_var = jnp.maximum(batch(f"{layer}/var"), 0) + epsilon  # rounding can leave a dead channel below zero
        return {
            "mean": rms((batch(f"{layer}/mean") - old[f"{layer}/mean"]) * jax.lax.rsqrt(var)),
            "var": rms(jnp.log(batch_var / var)),
        }

    return {layer: distances(layer) for layer in layers}


def rms(x: jax.Array) -> jax.Array:
    """√ mean x²."""
    return jnp.sqrt(jnp.mean(jnp.square(x)))
