"""Running averages of the batch moments."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bnjax.functional import _axes
from bnjax.functional._moments import Moments

# A running mean within 2 standard deviations of zero saves nothing as a pivot (the guard of batch_moments acts at 4),
# and a zero pivot keeps the sums on the CPU's fast path.
_NEAR_ZERO = 4.0


class RunningStats(NamedTuple):
    """Running mean and (biased) running variance, per channel; float32 at least."""

    mean: jax.Array  # [C]
    var: jax.Array  # [C]

    @property
    def pivot(self) -> jax.Array:
        """The running mean where it is worth subtracting before the rows are summed, else 0: for `batch_norm`."""
        return jnp.where(self.mean**2 > _NEAR_ZERO * self.var, self.mean, 0)


def update_running(running: RunningStats, moments: Moments, *, momentum: jax.Array | float = 0.99) -> RunningStats:
    r"""One step of the exponential moving averages.

    .. math::
        \mathrm{mean} \leftarrow m \cdot \mathrm{mean} + (1 - m)\, \mathrm{mean}_\text{batch}, \qquad
        \mathrm{var} \leftarrow m \cdot \mathrm{var} + (1 - m)\, \mathrm{var}_\text{batch}

    A channel whose moments are not finite, or that no row counted in, keeps its values: one bad batch leaves no trace.
    No gradient flows into the result.

    Args:
      running: `RunningStats(mean, var)`, each `[C]`.
      moments: `Moments` of the batch, each `[C]`.
      momentum: the weight of the OLD value, in [0, 1] (PyTorch's momentum is the weight of the new one); may be traced.

    Returns:
      `RunningStats`, in the dtypes of `running`.

    Raises:
      ValueError: the feature shapes differ, or momentum lies outside [0, 1].

    Examples:
      >>> import jax.numpy as jnp, bnjax
      >>> running = bnjax.RunningStats(mean=jnp.zeros(2), var=jnp.ones(2))
      >>> moments = bnjax.Moments(jnp.array([1.0, jnp.nan]), jnp.array([3.0, 1.0]), jnp.array([8.0, 8.0]))
      >>> running = bnjax.update_running(running, moments, momentum=0.9)
      >>> print(running.mean, running.var)
      [0.1 0. ] [1.2 1. ]

    References:
      Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167, section 3.1. Flax and Keras keep the biased variance, as
      here; PyTorch's running variance is divided by n − 1.
    """
    _axes.check_momentum(momentum)
    shapes = [jnp.shape(a) for a in (*running, *moments)]
    if len(set(shapes)) != 1:
        raise ValueError(f"running statistics and moments must have one feature shape; got {shapes}.")
    moments = Moments(*map(lax.stop_gradient, moments))
    counts = (moments.count > 0) & jnp.isfinite(moments.mean) & jnp.isfinite(moments.var)

    def step(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(counts, momentum * old + (1 - momentum) * new, old).astype(jnp.result_type(old))

    return RunningStats(step(running.mean, moments.mean), step(running.var, moments.var))
