"""Defines the protocol by which a batch normalization layer describes itself to the tools.

The modules of `bnjax.linen` and `bnjax.nnx` derive from `Normalization`. A variant overrides the methods that
differ. The tools in `bnjax.tools` call these methods and never look at the name of a class.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bnjax.functional._batch_norm import batch_norm
from bnjax.functional._moments import Moments, batch_moments
from bnjax.functional._normalize import normalize
from bnjax.functional._running import RunningStats, needs_steps


class Normalization:
    r"""Describes a layer to modules and tools: how it normalises in training and in evaluation, and what it averages.

    .. math:: y = \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}} \cdot \mathrm{scale} + \mathrm{bias}

    The methods of this class describe batch normalization. A variant derives from a module (or from this class, for
    :func:`bnjax.batch_norm_step`) and overrides those that differ:

    ===================== ============================================================================
    `normalize_batch`     y by the statistics of the batch, and the moments for the running averages
    `normalize_running`   y by the running averages
    `averaged_moments`    the moments of a batch that the running averages follow (recalibrate, inspect)
    `evaluation_affine`   a and c of y = a·x + c in evaluation (fold, export)
    `keeps_mean`          False where the running mean is always 0 (converters refuse states with another mean)
    `is_constant`         True where no call and no tool changes the statistics
    ===================== ============================================================================

    A class that overrides `normalize_batch` must also define `averaged_moments`, one that overrides
    `normalize_running` must define `evaluation_affine`, and one that overrides `__call__` must define both, because the
    inherited ones may be wrong for it. Where the inherited one is right, write
    `averaged_moments = bnjax.Normalization.averaged_moments`. Tools refuse a layer that does not define them.

    Examples:
      >>> import jax.numpy as jnp, bnjax
      >>> class RootMeanSquare(bnjax.Normalization):  # divides by √E[x²], without a mean
      ...     keeps_mean = False
      ...     def averaged_moments(self, x, **options):
      ...         m = bnjax.batch_moments(x, **options)
      ...         return bnjax.Moments(jnp.zeros_like(m.mean), m.var + m.mean**2, m.count)
      ...     def normalize_batch(self, x, running, *, axis_name=None, axis_index_groups=None, **options):
      ...         groups = dict(axis_name=axis_name, axis_index_groups=axis_index_groups)
      ...         m = self.averaged_moments(x, axis=options["axis"], mask=options["mask"], **groups)
      ...         return bnjax.normalize(x, m.mean, m.var, **options), m
      >>> x, running = jnp.array([[3.0], [4.0]]), bnjax.RunningStats(jnp.zeros(1), jnp.ones(1))
      >>> step = bnjax.batch_norm_step(x, running, variant=RootMeanSquare(), momentum=0.0)
      >>> print(f"{step.y[0, 0]:.2f} {step.y[1, 0]:.2f}", step.running.var)
      0.85 1.13 [12.5]

    References:
      Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167.
    """

    keeps_mean = True
    is_constant = False

    def counts_steps(self) -> bool:
        """Returns whether the layer needs the counter `RunningStats.steps`."""
        return needs_steps(getattr(self, "momentum", 0.99), getattr(self, "debias", False))

    def normalize_batch(self, x: jax.Array, running: RunningStats, **options: Any) -> tuple[jax.Array, Moments]:
        """Normalises x by the statistics of its batch.

        Args:
          x: `[..., C]`.
          running: the running averages before this batch, each `[C]`, for variants that use them.
          options: scale, bias, axis, epsilon, mask, axis_name, axis_index_groups and dtype, as in
            :func:`bnjax.batch_norm`.

        Returns:
          y, of the shape of x, and the `Moments` for the step of the running averages.
        """
        return batch_norm(x, **options)

    def normalize_running(self, x: jax.Array, running: RunningStats, **options: Any) -> jax.Array:
        """Normalises x by the running averages.

        Args:
          x: `[..., C]`.
          running: the running averages, each `[C]`.
          options: scale, bias, axis, epsilon, mask and dtype, as in :func:`bnjax.normalize`.

        Returns:
          y, of the shape of x.
        """
        return normalize(x, running.mean, running.var, **options)

    def averaged_moments(self, x: jax.Array, **options: Any) -> Moments:
        """Computes the moments of a batch that the running averages follow.

        Tools merge the results of several batches by :func:`bnjax.merge_moments`. A layer without a mean therefore
        returns mean 0 and E[x²] as var.

        Args:
          x: `[..., C]`.
          options: axis, mask, axis_name and axis_index_groups, as in :func:`bnjax.batch_moments`.

        Returns:
          `Moments`, each `[C]`.
        """
        return batch_moments(x, **options)

    def evaluation_affine(
        self, running: RunningStats, scale: jax.Array | None, bias: jax.Array | None, epsilon: float
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the a and c for which evaluation computes y = a·x + c.

        Args:
          running: the running averages, each `[C]`.
          scale: `[C]`, by which the standardised x is multiplied, or None for 1.
          bias: `[C]`, or None for 0.
          epsilon: added to the variance.

        Returns:
          a and c, each `[C]`.
        """
        a = lax.rsqrt(running.var + epsilon)
        a = a if scale is None else a * scale
        c = -running.mean * a
        return a, c if bias is None else c + bias


# What a class that overrides the method on the left must define too, in its own body or in a class derived from it.
_MUST_STATE = {
    "normalize_batch": ("averaged_moments",),
    "normalize_running": ("evaluation_affine",),
    "__call__": ("averaged_moments", "evaluation_affine"),
}


def unstated(layer: Any) -> str:
    """Returns which part of the protocol a layer does not define, as a sentence for an error; else an empty one."""
    if not isinstance(layer, Normalization):
        return f"{type(layer).__name__} is not a bnjax.Normalization, which would say what it computes."
    order = type(layer).__mro__
    defined = {name: next(i for i, c in enumerate(order) if name in vars(c)) for name in _defined_names(layer)}
    for method, statements in _MUST_STATE.items():
        for statement in statements:
            if defined.get(method, len(order)) < defined[statement]:
                return (
                    f"{order[defined[method]].__name__} overrides {method} but does not define {statement}, and "
                    f"the inherited one may be wrong for it. Define {statement} in the class, or write {statement} = "
                    f"bnjax.Normalization.{statement} there if it is as in batch normalization."
                )
    return ""


def _defined_names(layer: Any) -> list[str]:
    """Returns the names in `_MUST_STATE` that the class of the layer has, inherited ones included."""
    names = {*_MUST_STATE, *(s for statements in _MUST_STATE.values() for s in statements)}
    return [name for name in names if hasattr(type(layer), name)]


class AboutZero(Normalization):
    """Describes layers that subtract no mean: their running variance follows E[x²], and their running mean is 0."""

    keeps_mean = False

    def averaged_moments(self, x: jax.Array, **options: Any) -> Moments:
        """Returns the moments of a batch about zero: mean 0, and E[x²] = var + mean² as var."""
        moments = batch_moments(x, **options)
        return Moments(jnp.zeros_like(moments.mean), moments.var + moments.mean**2, moments.count)
