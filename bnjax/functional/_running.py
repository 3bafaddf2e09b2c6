"""Updates the running averages of the batch moments."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bnjax.functional import _axes, _collectives
from bnjax.functional._measure import squared
from bnjax.functional._moments import Moments

# The weight of the OLD running value: a number, a function from the step to it, or None for the plain average.
Momentum = jax.Array | float | Callable[[jax.Array], jax.Array | float] | None


# A batch of one row has a variance of 0 but for rounding, which is less than this part of mean².
_ROUNDING = 2.0**-22


class RunningStats(NamedTuple):
    r"""Running mean and running variance per channel, in float32 at least, and optional counts of batches.

    They start at :math:`\mathrm{mean} = 0, \mathrm{var} = 1`; :func:`bnjax.update_running` takes a step. The counts are
    floats like the averages, so that code that differentiates, averages or stores the tree treats all leaves alike.

    Attributes:
      mean: `[C]`.
      var: `[C]`, the average of the biased variances.
      steps: `[C]`, the number of batches that each channel has averaged; None where the averages do not depend on it.
      skipped: `[C]`, the number of batches that a channel skipped because their moments were not finite, or of which it
        averaged only the mean because they had one row; None to count nothing.

    Examples:
      >>> import jax.numpy as jnp, bnjax
      >>> running = bnjax.RunningStats(mean=jnp.zeros(2), var=jnp.ones(2))
      >>> moments = bnjax.batch_moments(jnp.array([[1.0, 10.0], [3.0, 30.0]]))
      >>> running = bnjax.update_running(running, moments, momentum=0.5)
      >>> print(running.mean, running.var)
      [ 1. 10.] [ 1.  50.5]
    """

    mean: jax.Array  # [C]
    var: jax.Array  # [C]
    steps: jax.Array | None = None  # [C], or None
    skipped: jax.Array | None = None  # [C], or None


def needs_steps(momentum: Momentum, debias: bool) -> bool:
    """Returns whether running averages with this momentum and debias need the counter `RunningStats.steps`."""
    return momentum is None or callable(momentum) or debias


def update_running(
    running: RunningStats,
    moments: Moments,
    *,
    momentum: Momentum = 0.99,
    debias: bool = False,
    unbiased_var: bool = False,
) -> RunningStats:
    r"""Takes one step of the running averages.

    .. math::
        \mathrm{mean} \leftarrow m \cdot \mathrm{mean} + (1 - m)\, \mathrm{mean}_\text{batch}, \qquad
        \mathrm{var} \leftarrow m \cdot \mathrm{var} + (1 - m)\, \mathrm{var}_\text{batch}

    With momentum None, :math:`m = t/(t + 1)` after t batches, which makes the plain average over all batches. With
    `debias`, m is replaced by :math:`m(1 - m^t)/(1 - m^{t+1})`, which gives the values that mean and var started with
    (0 and 1) no weight. In both cases the averages equal the first batch after the first step.

    A channel keeps its averages and its step if its moments are not finite or its count is zero, so that one bad batch
    leaves no trace. One row has no variance to average: where the count is at most 1 and the variance is within
    rounding of zero, the channel updates its mean and keeps its var. No gradient flows into the result.

    Args:
      running: `RunningStats(mean, var)`, each `[C]`, and also `steps`, `[C]`, where m depends on t.
      moments: `Moments` of the batch, each `[C]`.
      momentum: the weight m of the OLD value, in [0, 1] (PyTorch's momentum is the weight of the new one); or a
        function from the step t = 0, 1, ... of a channel to m (an Optax schedule); or None. A number may be traced, and
        then gives NaN if it is outside [0, 1].
      debias: leave the starting values out of the average. It is an error with a function, which can start at 0.
      unbiased_var: average var·n/(n − 1) for a batch of n rows on all devices, as PyTorch does.

    Returns:
      `RunningStats` in the dtypes of `running`, but float32 at least (an average in bfloat16 stops changing as soon as
      a step is smaller than its last digit), float64 where the moments are, and with a complex mean where theirs is.
      `steps` is one higher in channels that averaged the batch, and `skipped` in those that skipped it or averaged
      only its mean.

    Raises:
      ValueError: the feature shapes differ, momentum lies outside [0, 1], or `steps` is missing.

    Examples:
      >>> import jax.numpy as jnp, bnjax
      >>> running = bnjax.RunningStats(mean=jnp.zeros(2), var=jnp.ones(2))
      >>> moments = bnjax.Moments(jnp.array([1.0, jnp.nan]), jnp.array([3.0, 1.0]), jnp.array([8.0, 8.0]))
      >>> running = bnjax.update_running(running, moments, momentum=0.75)
      >>> print(running.mean, running.var)
      [0.25 0.  ] [1.5 1. ]
      >>> average = bnjax.RunningStats(mean=jnp.zeros(2), var=jnp.ones(2), steps=jnp.zeros(2))
      >>> average = bnjax.update_running(average, moments, momentum=None)
      >>> print(average.mean, average.var, average.steps)
      [1. 0.] [3. 1.] [1. 0.]

    References:
      Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167, section 3.1. Kingma & Ba 2015,
      https://arxiv.org/abs/1412.6980, section 3, on the bias of an average that started at a constant.

    Differences: Flax and Keras average the biased variance, as this function does by default; PyTorch averages the
    unbiased one. Equinox debiases its variance as if it had started at 0 (it divides by 1 − mᵗ), but it starts at 1.
    """
    running, moments = _axes.of_one_shape("running statistics and moments", running, moments)
    share = _share_of_new(momentum, debias, running.steps)
    if not all(jnp.issubdtype(v.dtype, jnp.inexact) for v in running if v is not None):
        raise TypeError(
            f"running statistics must be floating, because integers would round every step to 0; got "
            f"{running.mean.dtype} and {running.var.dtype}. Start with jnp.zeros(shape) and jnp.ones(shape)."
        )
    moments = Moments._make(_collectives.match(m, running.mean) for m in moments)  # the state keeps its sharding
    return _take_step(unbiased_var, running, moments, share)


@partial(jax.jit, static_argnums=0)  # traced and lowered once for each shape, however many layers have it
def _take_step(unbiased_var: bool, running: RunningStats, moments: Moments, share: jax.Array | float) -> RunningStats:
    """Takes a step of the running averages with the weight `share` of the moments, given checked arguments."""
    mean, var, n = lax.stop_gradient(moments)
    if unbiased_var:
        var = var * (jnp.maximum(n, 1) / jnp.maximum(n - 1, 1))
    good = (n > 0) & jnp.isfinite(mean) & jnp.isfinite(var)
    tells_var = good & ((n > 1) | (var > _ROUNDING * squared(mean)))  # many fractional weights may sum to 1

    def step(taken: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
        """Returns the average of old and new where taken, and old elsewhere."""
        dtype = _axes.statistics_dtype(old, new)
        old, new = old.astype(dtype), new.astype(dtype)
        return lax.select(taken, (1 - share) * old + share * new, old)

    def count(counter: jax.Array | None, counted: jax.Array) -> jax.Array | None:
        """Returns the counter plus 1 where counted, or None if there is no counter."""
        return None if counter is None else counter + counted.astype(counter.dtype)

    counters = count(running.steps, good), count(running.skipped, (n > 0) & ~tells_var)
    return RunningStats(step(good, running.mean, mean), step(tells_var, running.var, var), *counters)


def _share_of_new(momentum: Momentum, debias: bool, steps: jax.Array | None) -> jax.Array | float:
    """Returns the weight 1 − m of the new values: a number, or `[C]` where it depends on the step of each channel."""
    if momentum is not None and not callable(momentum):
        momentum = _axes.as_momentum(momentum)
        if not debias:
            return 1 - momentum
    if steps is None:
        raise ValueError(
            f"momentum={momentum!r} with debias={debias} depends on the step, and running.steps is None: "
            "start with RunningStats(mean, var, steps=jnp.zeros_like(mean))."
        )
    if not callable(momentum):
        return _share_of_averaged(1.0 if momentum is None else momentum, steps)
    if debias:
        raise ValueError("debias needs a constant momentum; a function of the step can start at momentum 0 itself.")
    # Call the schedule for one channel at a time, because schedules are written for a scalar step.
    at_steps = jnp.reshape(jax.vmap(momentum)(jnp.ravel(steps)), jnp.shape(steps))
    return 1 - _axes.bounded_momentum(at_steps)


def _share_of_averaged(momentum: jax.Array | float, t: jax.Array) -> jax.Array:
    """Returns the weight of batch t in the debiased average, (1 − m)/(1 − mᵗ⁺¹), for the momentum m.

    It is computed as 1/(1 + m·(1 + m + ... + mᵗ⁻¹)), which is exactly 1 at t = 0 and 1/(t + 1) at m = 1.
    """
    geometric = (momentum > 0) & (momentum < 1)  # the inner sum is t at m = 1 and is multiplied by 0 at m = 0
    log = jnp.log1p(-jnp.where(geometric, 1 - momentum, 0.5))  # log m, without rounding m first
    batches = jnp.where(geometric, jnp.expm1(t * log) / jnp.expm1(log), t)
    return 1 / (1 + momentum * batches)
