"""Batch normalization with given statistics: the evaluation mode."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bnjax.functional import _axes, _kernels
from bnjax.functional._finish import Activation, as_activation, as_residual, finish


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
    activation: Activation = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    r"""Normalises x by the mean and variance that are given.

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
        everything else stands by itself.
      dtype: of y; by default the promotion of x, scale and bias, as in Flax.
      activation: a function of the output, such as `jax.nn.relu`; a hashable one, and the same object every time.
      residual: of the shape of x, added before the activation: act(y + residual), as the separate operations.

    Returns:
      y, of the shape of x; differentiable in every array.

    Raises:
      ValueError: a shape, axis or epsilon that does not fit.
      TypeError: complex vectors for a real x, or a dtype that cannot hold the output.

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
    activation, residual = as_activation(activation), as_residual(residual, x)
    dtype = _axes.output_dtype(dtype, x, scale, bias)
    compute = _axes.statistics_dtype(x, mean, var)
    x = _kernels.readable(x, _axes.as_mask(mask, x), layout.expand(mean.astype(compute)))
    return _normalize(layout, epsilon, dtype, activation, x, mean, var, scale, bias, residual)


@partial(jax.jit, static_argnums=(0, 1, 2, 3), inline=True)
def _normalize(
    layout: _axes.Layout,
    epsilon: float,
    dtype: np.dtype,
    activation: Activation,
    x: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    residual: jax.Array | None,
) -> jax.Array:
    compute = _axes.statistics_dtype(x, mean, var)
    mean, var = mean.astype(compute), var.astype(jnp.finfo(compute).dtype)  # real also where x is complex
    a = lax.rsqrt(var + epsilon)
    a = a if scale is None else a * scale
    c = jnp.zeros_like(a) if bias is None else bias.astype(a.dtype)

    @_kernels.recompute
    def finished(x: jax.Array, residual: jax.Array | None, *vectors: jax.Array) -> jax.Array:
        return finish(_kernels.affine(x, *vectors).astype(dtype), residual, activation)

    return finished(x, residual, *map(layout.expand, (mean, a, c)))
