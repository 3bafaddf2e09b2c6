"""Implements frozen batch normalization: statistics, scale and bias are constants, as in detection and fine-tuning."""

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from bnjax.functional import _axes
from bnjax.functional._normalize import normalize
from bnjax.functional._protocol import Normalization
from bnjax.functional._running import RunningStats


def frozen_batch_norm(
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
    r"""Normalises x by given statistics, scale and bias, which are all constants in the derivative.

    .. math:: y = \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}} \cdot \mathrm{scale} + \mathrm{bias}

    Args:
      x: `[..., C]`, any dtype.
      mean, var: `[C]`, the running averages of the pre-trained network.
      scale: `[C]`, or None for 1.
      bias: `[C]`, or None for 0.
      axis: the feature axis or axes.
      epsilon: added to the variance; positive.
      mask: non-negative weights, broadcastable to x. NaN or Inf at a position of weight zero is read as the mean.
      dtype: of y; by default the promotion of x, scale and bias.

    Returns:
      y, of the shape of x; differentiable in x alone.

    Raises:
      ValueError, TypeError: as :func:`bnjax.normalize`.

    Examples:
      >>> import jax, jax.numpy as jnp, bnjax
      >>> x, one = jnp.array([[1.0], [3.0]]), jnp.ones(1)
      >>> f = lambda x, scale: bnjax.frozen_batch_norm(x, one, 3 * one, scale, epsilon=1.0).sum()
      >>> dx, dscale = jax.grad(f, (0, 1))(x, one)
      >>> print(dx.ravel(), dscale)
      [0.5 0.5] [0.]

    References:
      He, Zhang, Ren & Sun 2016, https://arxiv.org/abs/1512.03385, appendix A: "the BN layers are fixed".
    """
    x = _axes.as_input(x)
    layout = _axes.layout_of(x, axis)
    dtype = _axes.output_dtype(dtype, x, scale, bias)
    mean, var, scale, bias = lax.stop_gradient((mean, _axes.as_variance(var, layout), scale, bias))
    return normalize(x, mean, var, scale, bias, axis=axis, epsilon=epsilon, mask=mask, dtype=dtype)


class Frozen(Normalization):
    """Describes a FrozenBatchNorm layer: it normalises by its running averages, which no call or tool changes."""

    is_constant = True

    def normalize_running(self, x: jax.Array, running: RunningStats, **options: Any) -> jax.Array:
        """Normalises x by the running averages, with statistics, scale and bias as constants in the derivative."""
        return frozen_batch_norm(x, running.mean, running.var, **options)

    evaluation_affine = Normalization.evaluation_affine
