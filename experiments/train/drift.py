"""Measures how far the moments of each batch are from the running statistics that evaluation uses instead."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

Layers = dict[str, dict[str, jax.Array]]


def drift(before: Mapping[str, Any], after: Mapping[str, Any], *, momentum: float, epsilon: float) -> Layers:
    """Computes the distance between batch and running statistics, as two numbers for each normalization layer.

    With the running statistics μ, σ² before the step and the moments m, v of the batch:

        mean = √ mean_c (m − μ)² / (σ² + ε)             in standard deviations
        var  = √ mean_c (log((v + ε) / (σ² + ε)))²      in nepers: 0.1 is 10 %

    The batch moments cost no further pass: the update `new = momentum·old + (1 − momentum)·m` gives `m = (new −
    momentum·old) / (1 − momentum)`. Its rounding error, about 1e-7 / (1 − momentum) of μ, is far below any drift worth
    plotting. A channel that kept its averages, because the batch was not finite, counts as zero drift.

    Args:
        before: the `batch_stats` collection before the step.
        after: the collection after it.
        momentum: of the layers, below one.
        epsilon: of the layers.

    Returns:
        `{layer: {"mean": [], "var": []}}`, float32 scalars.
    """
    old, new = flatten_dict(dict(before), sep="/"), flatten_dict(dict(after), sep="/")
    layers = sorted(name.removesuffix("/mean") for name in old if name.endswith("/mean"))

    def batch(name: str) -> jax.Array:
        """Recovers the batch moment from the running average before and after the step."""
        return (new[name] - momentum * old[name]) / (1 - momentum)

    def distances(layer: str) -> dict[str, jax.Array]:
        """Returns the two distances of one layer."""
        var = old[f"{layer}/var"] + epsilon
        batch_var = jnp.maximum(batch(f"{layer}/var"), 0) + epsilon  # rounding can leave a dead channel below zero
        return {
            "mean": rms((batch(f"{layer}/mean") - old[f"{layer}/mean"]) * jax.lax.rsqrt(var)),
            "var": rms(jnp.log(batch_var / var)),
        }

    return {layer: distances(layer) for layer in layers}


def rms(x: jax.Array) -> jax.Array:
    """Computes the root mean square, √ mean x², over all elements."""
    return jnp.sqrt(jnp.mean(jnp.square(x)))
