"""Normalises by given statistics, as batch normalization does in evaluation."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bnjax.functional import _axes, _collectives


def normalize(
    x: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-5,
    mask: jax.Array | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    r"""Normalises x by a given mean and variance, as in evaluation.

    .. math:: y = \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}} \cdot \mathrm{scale} + \mathrm{bias}

    Args:
      x: `[..., C]`, any dtype; the arithmetic is in float32 at least, and the statistics are never cast down.
      mean: `[C]`.
      var: `[C]`, biased variance. One that is negative, NaN or Inf is an error in a NumPy array or list; in a
        jax.Array, whose values a trace cannot see, it makes y of its channel NaN.
      scale: `[C]`, or None for 1.
      bias: `[C]`, or None for 0.
      axis: the feature axis or axes.
      epsilon: added to the variance; positive.
      mask: non-negative weights, broadcastable to x. A NaN or Inf at a position of weight zero is read as the mean;
        the mask changes nothing else.
      dtype: of y; by default the promotion of x, scale and bias, as in Flax.

    Returns:
      y, of the shape of x; differentiable in every array.

    Raises:
      ValueError: a shape, axis or epsilon does not fit, or a known variance is negative or not finite.
      TypeError: a vector is complex and x is not, or `dtype` cannot hold the output.

    Examples:
      >>> import jax.numpy as jnp, bnjax
      >>> print(bnjax.normalize(jnp.array([[1.0, 3.0]]), mean=jnp.array([1.0, 1.0]), var=jnp.array([1.0, 4.0])))
      [[0.         0.99999875]]

    References:
      Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167, algorithm 2.
    """
    x = _axes.as_input(x)
    layout = _axes.layout_of(x, axis)
    mean, var = _axes.as_vector("mean", mean, layout, x), _axes.as_variance(var, layout)
    scale, bias = _axes.as_optional("scale", scale, layout, x), _axes.as_optional("bias", bias, layout, x)
    epsilon = _axes.check_epsilon(epsilon, _axes.statistics_dtype(x, mean, var))
    dtype = _axes.output_dtype(dtype, x, scale, bias)
    return _normalize(layout, epsilon, dtype, x, mean, var, scale, bias, _axes.as_mask(mask, x))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _normalize(
    layout: _axes.Layout,
    epsilon: float,
    dtype: np.dtype,
    x: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    mask: jax.Array | None,
) -> jax.Array:
    """Normalises x by a given mean and variance, given checked arguments; traced once per shape."""
    wide = _axes.statistics_dtype(x, mean, var)
    mean, var = mean.astype(wide), var.astype(jnp.finfo(wide).dtype)  # real also where x is complex
    a = lax.rsqrt(var + epsilon)
    if scale is not None:
        a = a * _collectives.match(scale.astype(_axes.statistics_dtype(scale, mean)), a)
    c = jnp.zeros_like(a) if bias is None else _collectives.match(bias.astype(_axes.statistics_dtype(bias, mean)), a)

    @partial(jax.checkpoint, prevent_cse=False)  # keeps x for the derivative, not its float32 copy
    def affine(x: jax.Array, mean: jax.Array, a: jax.Array, c: jax.Array) -> jax.Array:
        x = x.astype(wide)
        if mask is not None:
            x = jnp.where(_axes.takes_part(mask) | jnp.isfinite(x), x, mean)
        return ((x - mean) * a + c).astype(dtype)

    return affine(x, *map(layout.expand, (mean, a, c)))
