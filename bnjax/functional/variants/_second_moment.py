"""Normalises by E[x²] alone, with a backward pass whose statistics are averaged over steps.

The derivative of xhat = x/χ with χ² = E[x²] is dx = (dxhat − xhat·Λ)/χ, with the statistic Λ = Σ dxhat·xhat / W of the
batch's own gradient. Power normalization and MABN put an average over recent steps in its place:

    dx = (dxhat − xhat·Λ')/χ.

This is not the transpose of a derivative: Λ' comes from other steps, so dx is affine in dxhat and not linear (with
dxhat = 0, −xhat·Λ'/χ remains). It therefore needs a `custom_vjp`, the only one of this library; the code around it is
ordinary. The averages are a state that only the backward pass can update. It returns the new state as the "gradient"
of the old one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bnjax.functional import _axes, _collectives
from bnjax.functional._derivative import widen
from bnjax.functional._measure import Reduction, averages
from bnjax.functional._moments import Moments

# A function (state, Λ of this batch, Scaling) -> (Λ', new state).
Rule = Callable[[Any, jax.Array, "Scaling"], tuple[jax.Array, Any]]


class Scaling(NamedTuple):
    """Holds the scaling of x and the statistics of the batch for the backward pass; constants in the derivative."""

    rstd: jax.Array  # [C], 1/χ
    square: jax.Array  # [C], E[x²] of this batch
    count: jax.Array  # type: ignore[assignment]  # [C], W


class Operands(NamedTuple):
    """Holds the checked arguments that power normalization and MABN have in common."""

    reduction: Reduction
    epsilon: float
    dtype: np.dtype
    x: jax.Array
    mask: jax.Array | None
    scale: jax.Array | None
    bias: jax.Array | None

    @property
    def readable(self) -> jax.Array:
        """Returns x with 0 in place of NaN and Inf at positions of weight zero."""
        return self.x if self.mask is None else jnp.where(_axes.takes_part(self.mask) | jnp.isfinite(self.x), self.x, 0)

    @property
    def moments(self) -> Moments:
        """Returns moments about zero: mean 0 and var = Σwx²/W, pooled over devices; sums of squares lose no digits."""
        _, square, count = averages(widen(self.x), self.mask, self.reduction)
        return Moments(jnp.zeros_like(square), square, jnp.full_like(square, count))

    def vector(self, name: str, v: jax.Array) -> jax.Array:
        """Returns a running statistic `[C]` without gradient, in the dtype of the statistics."""
        v = lax.stop_gradient(_axes.as_vector(name, v, self.reduction.layout))
        return v.astype(_axes.statistics_dtype(self.x, v))

    def apply(self, factor: jax.Array, through: Callable[..., jax.Array] | None = None, *state: Any) -> jax.Array:
        """Returns y = x·factor·scale + bias.

        Args:
          factor: `[C]`.
          through: called with x and `state`; returns x with another derivative. None for the ordinary one.
          state: further arguments of `through`.
        """
        a = factor if self.scale is None else factor * self.scale.astype(factor.dtype)
        c = jnp.zeros_like(a) if self.bias is None else self.bias.astype(a.dtype)
        a, c = map(self.reduction.layout.expand, _collectives.vary_together((a, c), self.x))

        @partial(jax.checkpoint, prevent_cse=False)  # keeps x for the derivative, not its float32 copy
        def affine(x: jax.Array, a: jax.Array, c: jax.Array, *state: Any) -> jax.Array:
            x = x.astype(a.dtype) if through is None else through(x, *state)
            return (x * a + c).astype(self.dtype)

        return affine(self.readable, a, c, *state)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def estimated(
    rule: Rule, reduction: Reduction, x: jax.Array, mask: jax.Array | None, scaling: Scaling, state: Any
) -> jax.Array:
    """Returns x in the dtype of the statistics, with a backward pass that subtracts the term with Λ'.

    Let dx̃ be the gradient that arrives here: that of x̃ = x in y = x̃·rstd·scale + bias. Then scale need not be known:
    Λ = Σ dxhat·xhat/W = Σ dx̃·x/W and dx = dx̃ − w·x·rstd²·Λ'.

    Args:
      rule: computes Λ' and the new state from the old state and Λ.
      reduction: the axes and devices whose rows are pooled.
      x: `[..., C]`.
      mask: the weights, or None.
      scaling: rstd, E[x²] and the count of the batch.
      state: the averages, whose gradient is the new state.
    """
    return x.astype(scaling.rstd.dtype)


def _estimated_fwd(
    rule: Rule, reduction: Reduction, x: jax.Array, mask: jax.Array | None, scaling: Scaling, state: Any
) -> tuple[jax.Array, Any]:
    """Returns the value of `estimated`, and what its backward pass needs."""
    return estimated(rule, reduction, x, mask, scaling, state), (x, mask, scaling, state)


def _estimated_bwd(rule: Rule, reduction: Reduction, kept: Any, dx: jax.Array) -> tuple[Any, ...]:
    """Returns dx, None for mask and scaling, and the new state (the old one where the batch is not finite)."""
    x, mask, scaling, state = kept
    layout, W = reduction.layout, scaling.count
    wide = x.astype(dx.dtype)
    total = jnp.sum(wide * dx, layout.rows)
    (pooled,) = _collectives.pool([total], reduction.group)
    projection = pooled / jnp.where(W > 0, W, 1)
    average, new = rule(state, projection, scaling)
    good = (W > 0) & jnp.isfinite(projection) & jnp.isfinite(scaling.square)
    pull = wide * layout.expand(average * scaling.rstd**2)
    if mask is not None:
        pull = jnp.where(_axes.takes_part(mask), pull if mask.dtype == bool else mask.astype(dx.dtype) * pull, 0)
    new = jax.tree.map(lambda n, old: _of_all(jnp.where(jnp.broadcast_to(good, n.shape), n, old), old), new, state)
    return (dx - pull).astype(x.dtype), None, None, new


def _of_all(new: jax.Array, old: jax.Array) -> jax.Array:
    """Returns the new state averaged over devices that normalised separately, so that a shared state stays shared."""
    missing = tuple(sorted(_collectives.varying(new) - _collectives.varying(old)))
    return (lax.pmean(new, missing) if missing else new).astype(old.dtype)


estimated.defvjp(_estimated_fwd, _estimated_bwd)
