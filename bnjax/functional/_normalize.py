"""Batch normalization with given statistics: the evaluation mode."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bnjax.functional import _axes, _kernels


def normalize(
    x: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-5,
    dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    r"""Normalises x by the mean and variance that are given.

    .. math:: y = \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}} \cdot \mathrm{scale} + \mathrm{bias}

    Args:
      x: `[..., C]`, any real dtype; the arithmetic is in float32 at least, and the statistics are never cast down.
      mean: `[C]`.
      var: `[C]`, biased variance.
      scale: `[C]`, or None for 1.
      bias: `[C]`, or None for 0.
      axis: the feature axis or axes.
      epsilon: added to the variance; positive.
      dtype: of y; by default the promotion of x, scale and bias, as in Flax.

    Returns:
      y, of the shape of x; differentiable in every array.

    Raises:
      ValueError: a shape, axis or epsilon that does not fit.
      TypeError: complex x, or a dtype that is not floating.

    Examples:
      >>> import jax.numpy as jnp, bnjax
      >>> print(bnjax.normalize(jnp.array([[1.0, 3.0]]), mean=jnp.array([1.0, 1.0]), var=jnp.array([1.0, 4.0])))
      [[0.         0.99999875]]

    References:
      Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167, algorithm 2.
    """
    x = _axes.as_input(x)
    layout = _axes.layout_of(x, axis)
    mean, var = _axes.as_vector("mean", mean, layout), _axes.as_vector("var", var, layout)
    scale, bias = _axes.as_optional("scale", scale, layout), _axes.as_optional("bias", bias, layout)
    epsilon = _axes.check_epsilon(epsilon)
    return _normalize(layout, epsilon, _axes.output_dtype(dtype, x, scale, bias), x, mean, var, scale, bias)


@partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _normalize(
    layout: _axes.Layout,
    epsilon: float,
    dtype: np.dtype,
    x: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
) -> jax.Array:
    compute = _axes.statistics_dtype(x, mean, var)
    mean, var = mean.astype(compute), var.astype(compute)
    a = lax.rsqrt(var + epsilon)
    a = a if scale is None else a * scale
    c = jnp.zeros_like(a) if bias is None else bias.astype(a.dtype)
    return _kernels.recompute(_kernels.affine)(x, *map(layout.expand, (mean, a, c))).astype(dtype)
