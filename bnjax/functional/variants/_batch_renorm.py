"""Implements batch renormalization: x is normalised by its batch, then corrected towards the running averages."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bnjax.functional import _axes, _collectives
from bnjax.functional._batch_norm import normalize_batch
from bnjax.functional._measure import Measured, Reduction
from bnjax.functional._moments import Moments
from bnjax.functional._protocol import Normalization
from bnjax.functional._running import RunningStats

Limit = jax.Array | float | Callable[[jax.Array], jax.Array]  # a number, or a function from the step to it


def renorm_r_max(step: jax.Array) -> jax.Array:
    r"""Returns the limit of r that the paper uses: 1 for 5000 steps, then linear to 3 at step 40 000.

    .. math:: r_{max} = 1 + 2 \cdot \mathrm{clip}\Bigl(\frac{\mathrm{step} - 5000}{35\,000}, 0, 1\Bigr)

    Args:
      step: a number, or `[C]`: the batches so far.

    Returns:
      The limit, of the shape of step and float32.

    Examples:
      >>> import jax.numpy as jnp, bnjax
      >>> print(bnjax.renorm_r_max(jnp.array([0.0, 22_500.0, 1e6])))
      [1. 2. 3.]

    References:
      Ioffe 2017, https://arxiv.org/abs/1702.03275, section 4.
    """
    return jnp.interp(step, jnp.array([5e3, 40e3]), jnp.array([1.0, 3.0]))


def renorm_d_max(step: jax.Array) -> jax.Array:
    r"""Returns the limit of d that the paper uses: 0 for 5000 steps, then linear to 5 at step 25 000.

    .. math:: d_{max} = 5 \cdot \mathrm{clip}\Bigl(\frac{\mathrm{step} - 5000}{20\,000}, 0, 1\Bigr)

    Args:
      step: a number, or `[C]`: the batches so far.

    Returns:
      The limit, of the shape of step and float32.

    Examples:
      >>> import jax.numpy as jnp, bnjax
      >>> print(bnjax.renorm_d_max(jnp.array([0.0, 15_000.0, 1e6])))
      [0.  2.5 5. ]

    References:
      Ioffe 2017, https://arxiv.org/abs/1702.03275, section 4.
    """
    return jnp.interp(step, jnp.array([5e3, 25e3]), jnp.array([0.0, 5.0]))


def limit_at(limit: Limit, steps: jax.Array | None) -> jax.Array | float:
    """Returns a limit, or the value of a schedule at the step of each channel (at step 0 where steps is None)."""
    if not callable(limit):
        return limit
    if steps is None:
        return limit(jnp.zeros(()))
    return jnp.reshape(jax.vmap(limit)(jnp.ravel(steps)), steps.shape)  # a schedule is written for a scalar step


def batch_renorm(
    x: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    r_max: jax.Array | float = 3.0,
    d_max: jax.Array | float = 5.0,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-5,
    mask: jax.Array | None = None,
    axis_name: _collectives.AxisName = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> tuple[jax.Array, Moments]:
    r"""Normalises x by its own batch and corrects the result towards the running averages that evaluation uses.

    .. math::
        y = \Bigl(\frac{x - \mathrm{mean}_B}{\sigma_B} \cdot r + d\Bigr) \cdot \mathrm{scale} + \mathrm{bias}, \qquad
        r = \mathrm{clip}\Bigl(\frac{\sigma_B}{\sigma}, \frac1{r_{max}}, r_{max}\Bigr), \quad
        d = \mathrm{clip}\Bigl(\frac{\mathrm{mean}_B - \mathrm{mean}}{\sigma}, -d_{max}, d_{max}\Bigr)

    with :math:`\sigma^2 = \mathrm{var} + \epsilon` and the moments of the batch B as in :func:`bnjax.batch_norm`. r and
    d are constants in the derivative. Where neither is clipped, y equals that of :func:`bnjax.normalize`; with r_max
    = 1 and d_max = 0 it equals that of `batch_norm`. It is meant for small batches, and for batches whose rows are not
    independent.

    Args:
      x: `[..., C]`, any real dtype.
      mean: `[C]`, the running mean before this batch.
      var: `[C]`, the running variance before this batch.
      scale: `[C]`, or None for 1.
      bias: `[C]`, or None for 0.
      r_max: limit of r and 1/r, at least 1: a number or `[C]`; :func:`bnjax.renorm_r_max` gives that of the paper at a
        step.
      d_max: limit of \|d\|, at least 0: a number or `[C]`; :func:`bnjax.renorm_d_max` gives that of the paper at a
        step.
      axis: the feature axis or axes; all others are reduced over.
      epsilon: added to the variance; positive.
      mask: non-negative weights (bool, integer or float), broadcastable to x; see :func:`bnjax.batch_norm`.
      axis_name: name, or names, of the mapped axes (`shard_map`, `pmap`, `vmap`) that share statistics.
      axis_index_groups: groups of indices along `axis_name`, of one size, that share statistics.
      dtype: of y; by default the promotion of x, scale and bias.

    Returns:
      y, of the shape of x, and the `Moments` of the batch, each `[C]`, for the running averages.

    Raises:
      ValueError: r_max below 1 or d_max below 0; else as :func:`bnjax.batch_norm`.
      TypeError: as :func:`bnjax.batch_norm`.

    Examples:
      >>> import jax.numpy as jnp, bnjax
      >>> x, mean, var = jnp.array([[1.0], [2.0]]), jnp.array([0.0]), jnp.array([1.0])
      >>> y, _ = bnjax.batch_renorm(x, mean, var)
      >>> print(jnp.round(y, 3).ravel(), jnp.round(bnjax.normalize(x, mean, var), 3).ravel())
      [1. 2.] [1. 2.]
      >>> y, _ = bnjax.batch_renorm(x, mean, var, r_max=1.0, d_max=0.0)
      >>> print(jnp.round(y, 3).ravel())
      [-1.  1.]

    References:
      Ioffe 2017, https://arxiv.org/abs/1702.03275, algorithm 1; the limits by step are those of section 4.

    Differences: the paper and TensorFlow average the standard deviation. Here σ is the root of the averaged variance,
    so that variables, checkpoints and evaluation are those of batch normalization. Keras's `renorm=True` clips only
    what `renorm_clipping` names, by default nothing: here that is r_max = d_max = inf, from the first step. It corrects
    towards averages of their own, with `renorm_momentum`; here they are those of evaluation.
    """
    x = _axes.as_real_input(x)
    layout = _axes.layout_of(x, axis)
    _check_limits(r_max, d_max)
    group = _collectives.group_of(axis_name, axis_index_groups, x.shape)
    epsilon = _axes.check_epsilon(epsilon, _axes.statistics_dtype(x))
    running = RunningStats(_axes.as_vector("mean", mean, layout), _axes.as_variance(var, layout))
    scale, bias = _axes.as_optional("scale", scale, layout), _axes.as_optional("bias", bias, layout)
    dtype = _axes.output_dtype(dtype, x, scale, bias)
    weights = _axes.as_weights(_axes.as_mask(mask, x), x)
    static = Reduction(layout, group), epsilon, dtype, _Correction(epsilon)
    return normalize_batch(*static, x, scale, bias, weights, running, r_max, d_max)


class Renorm(Normalization):
    """Describes a BatchRenorm layer to the modules and tools; a module adds the fields r_max and d_max."""

    r_max: Limit
    d_max: Limit

    def normalize_batch(self, x: jax.Array, running: RunningStats, **options: Any) -> tuple[jax.Array, Moments]:
        """Normalises x by its batch, corrected towards the running averages, with the limits at the current step."""
        r_max, d_max = limit_at(self.r_max, running.steps), limit_at(self.d_max, running.steps)
        return batch_renorm(x, running.mean, running.var, r_max=r_max, d_max=d_max, **options)

    averaged_moments = Normalization.averaged_moments

    def counts_steps(self) -> bool:
        """Returns whether a limit or an average depends on the step, so that batches must be counted."""
        return callable(self.r_max) or callable(self.d_max) or super().counts_steps()


class _Correction(NamedTuple):
    """Computes r and d, clipped to their limits.

    σ_B is taken as 1/rstd and not as the root of the variance, so that r does not overflow where the variance does.
    """

    epsilon: float

    def __call__(
        self,
        batch: Measured,
        rstd: jax.Array,
        running: RunningStats,
        r_max: jax.Array | float,
        d_max: jax.Array | float,
    ) -> tuple[jax.Array, jax.Array]:
        sigma = jnp.sqrt(running.var.astype(rstd.dtype) + self.epsilon)
        r = 1 / (rstd * sigma)
        d = ((batch.K - running.mean.astype(rstd.dtype)) + batch.e) / sigma
        return jnp.clip(r, 1 / r_max, r_max), jnp.clip(d, -d_max, d_max)


def _check_limits(r_max: jax.Array | float, d_max: jax.Array | float) -> None:
    """Raises ValueError where r_max is below 1 or d_max below 0; traced limits are not checked."""
    for name, limit, least in (("r_max", r_max, 1), ("d_max", d_max, 0)):
        if isinstance(limit, jax.core.Tracer):
            continue
        if np.asarray(limit).dtype.kind not in "iuf":
            raise TypeError(f"{name} must be a number, or one for each channel; got {limit!r}.")
        if not np.all(np.asarray(limit) >= least):
            raise ValueError(f"{name} must be at least {least}, which means no correction; got {limit}.")
