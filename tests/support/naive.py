"""Computes the textbook formula in plain jax.numpy, for autodiff to differentiate; accurate in float64."""

import jax.numpy as jnp


def moments(x, features, mask=None):
    """Computes mean, biased variance and count with the rank of x; an empty channel has mean 0 and var 0."""
    rows = tuple(a for a in range(x.ndim) if a not in features)
    w = jnp.ones_like(x) if mask is None else jnp.broadcast_to(jnp.asarray(mask, x.dtype), x.shape)
    held = jnp.where(w > 0, x, 0)
    count = jnp.maximum(w.sum(rows, keepdims=True), 1e-300)
    mean = (w * held).sum(rows, keepdims=True) / count
    return mean, (w * jnp.where(w > 0, x - mean, 0) ** 2).sum(rows, keepdims=True) / count, count


def readable(x, mean, mask=None):
    """Replaces non-finite x at positions of weight zero by the mean."""
    return x if mask is None else jnp.where((jnp.asarray(mask) == 0) & ~jnp.isfinite(x), mean, x)


def batch_norm(x, scale, bias, features, epsilon=1e-5, mask=None):
    rows = tuple(a for a in range(x.ndim) if a not in features)
    mean, var, _ = moments(x, features, mask)
    x = readable(x, mean, mask)
    return (x - mean) / jnp.sqrt(var + epsilon) * jnp.expand_dims(scale, rows) + jnp.expand_dims(bias, rows)
