r"""How far the folded network is from the model, and how far rounding alone could bring it.

Folding rounds: a and c, their product with the kernel, and the sums of the layer, in which other numbers meet. A sum of
n products as computed is exactly that of a kernel whose elements are off by a relative γ ≤ λ·√n·u, u being the unit
roundoff and λ a few (Higham & Mary 2019, https://epubs.siam.org/doi/10.1137/18M1226312); a, c and what is stored add a
few u to that. So the folded network is the model with such a kernel, bias and statistics. What this does to the output,
through all the layers behind, the model itself says: it runs again with every variable that took part off by γ, up or
down at random.
"""

from collections.abc import Callable, Sequence
from math import prod, sqrt
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnjax.tools._fold._pairs import Match
from bnjax.tools._trees import Tree

Run = Callable[[Any, Any], Any]  # variables or a state, and the input, to the output

_ROUNDINGS = 4  # of a or c, of its product with the kernel, of the bias, of what is stored
_DRAWS = 3
_MARGIN = 8  # λ, and for the largest of few draws not being the largest there is


def difference(y: Any, other: Any) -> float:
    """Returns max|y′ − y| / max|y| over all arrays of the output; NaN and Inf at the same places are no difference."""
    apart, largest = map(float, _apart(y, other))
    return apart / largest if largest else apart


@jax.jit
def _apart(y: Any, other: Any) -> tuple[jax.Array, jax.Array]:
    apart = largest = jnp.zeros(())
    for a, b in zip(jax.tree.leaves(y), jax.tree.leaves(other), strict=True):
        a, b = (v.astype(jnp.promote_types(v.dtype, jnp.float32)) for v in (a, b))
        gap = jnp.where((a == b) | (jnp.isnan(a) & jnp.isnan(b)), 0, jnp.abs(a - b))
        apart = jnp.maximum(apart, jnp.max(jnp.where(jnp.isnan(gap), jnp.inf, gap), initial=0))
        largest = jnp.maximum(largest, jnp.max(jnp.where(jnp.isfinite(a), jnp.abs(a), 0), initial=0))
    return apart, largest


def rounding(run: Run, tree: Tree, matches: Sequence[Match], x: Any, y: Any) -> float:
    """Returns the largest difference from y that rounding can make, in units of :func:`difference`.

    Args:
      run: the model as a function of its variables.
      tree: its variables.
      matches: what was folded.
      x: the sample.
      y: the output of the model for it.
    """
    unit = _unit(matches, y)
    errors = _relative_errors(tree, matches, unit)
    rng, furthest = np.random.default_rng(0), 0.0
    for _ in range(_DRAWS):
        leaves = list(tree.leaves)
        for i, gamma in errors.items():
            signs = 1 - 2 * rng.integers(0, 2, leaves[i].shape, np.int8)
            leaves[i] = leaves[i] * (1 + gamma * signs).astype(leaves[i].dtype)
        furthest = max(furthest, difference(y, run(tree.build(leaves), x)))
    return _MARGIN * (furthest + unit)


def _unit(matches: Sequence[Match], y: Any) -> float:
    """Returns the unit roundoff of the coarsest numbers that the pairs and the output are in."""
    sites = [site for match in matches for site in (match.norm, match.layer)]
    dtypes = [*(site.dtype for site in sites), *(jnp.result_type(leaf) for leaf in jax.tree.leaves(y))]
    units = [float(jnp.finfo(dtype).eps) for dtype in dtypes if jnp.issubdtype(dtype, jnp.inexact)]
    if jax.default_backend() != "cpu" and any(getattr(site.layer, "coarse", False) for site in sites):
        units.append(float(jnp.finfo(jnp.bfloat16).eps))
    return max(units)


def _relative_errors(tree: Tree, matches: Sequence[Match], unit: float) -> dict[int, float]:
    """Returns γ for each leaf that takes part."""
    at = {name: i for i, name in enumerate(tree.names)}
    single = float(jnp.finfo(jnp.float32).eps)  # sums are in float32 at least
    errors: dict[int, float] = {}
    for match in matches:
        layer: Any = match.layer.layer
        kernel = tree.leaves[at[*match.layer.path, "kernel"]].shape[-layer.rank :]
        terms = prod(kernel) / kernel[layer.out_axis]
        for site, name, n in [
            (match.layer, "kernel", terms),
            (match.layer, "bias", 0),
            *((match.norm, name, 0) for name in ("mean", "var", "scale", "bias")),
        ]:
            if (i := at.get((*site.path, name))) is not None:
                errors[i] = _ROUNDINGS * unit + sqrt(n) * min(unit, single)
    return errors
