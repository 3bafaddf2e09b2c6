"""Checks of statistics that are about to be built into a network, such as a negative variance from a bad checkpoint."""

import jax
import numpy as np

from bnjax.tools._trees import Tree, show


def check_variances(tree: Tree) -> Tree:
    """Checks a tree and returns it; raises ValueError for averages that are not finite, or a negative variance.

    Arrays of a trace are trusted: their values are not known, and :func:`bnjax.normalize` answers them with NaN.
    """
    for layer in tree.layers:
        stats = tree.stats(layer)
        if any(isinstance(s, jax.core.Tracer) for s in stats.values()):
            continue
        mean, var = (np.asarray(stats[role]) for role in ("mean", "var"))
        broken = ~(np.isfinite(mean) & np.isfinite(var) & (var >= 0))
        if broken.any():
            raise ValueError(
                f"running averages must be finite, and variances not negative; {int(broken.sum())} of {broken.size} "
                f"channels of {show(layer)} are not: mean {mean[broken][:3]}, var {var[broken][:3]}. Load another "
                "checkpoint, or reset_stats() and recalibrate()."
            )
    return tree
