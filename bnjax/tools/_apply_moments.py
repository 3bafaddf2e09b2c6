"""One update of the running averages from moments that were gathered over several calls."""

from collections.abc import Mapping
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax.functional import Moments, RunningStats, update_running


def apply_moments(
    batch_stats: Mapping[str, Any], moments: Mapping[str, Any], *, momentum: jax.Array | float = 0.99
) -> dict[str, Any]:
    r"""The running averages of every layer, one step on: :func:`bnjax.update_running` over a tree.

    For gradient accumulation: call the model with `update_stats=False` and `mutable=["moments"]`, pass the collection
    `moments` on from micro-batch to micro-batch, and apply it once per optimizer step. The moments are those of all the
    micro-batches together, the variance of their means included.

    Args:
      batch_stats: the linen collection, `{mean, var}` per layer, each `[C]`.
      moments: the collection of that name that :class:`bnjax.linen.BatchNorm` fills, `{mean, var, count}` per layer.
        Layers without moments keep their averages.
      momentum: the weight of the OLD values.

    Returns:
      The new `batch_stats`.

    Raises:
      ValueError: moments of a layer that has no statistics.

    Examples:
      >>> import jax, jax.numpy as jnp, bnjax
      >>> norm = bnjax.BatchNorm(use_running_average=False, use_scale=False, use_bias=False)
      >>> stats = norm.init(jax.random.key(0), jnp.zeros((1, 1)))["batch_stats"]
      >>> moments = {}
      >>> for x in (jnp.array([[0.0], [2.0]]), jnp.array([[6.0], [8.0]])):
      ...     variables = {"batch_stats": stats, "moments": moments}
      ...     _, updates = norm.apply(variables, x, update_stats=False, mutable=["moments"])
      ...     moments = updates["moments"]
      >>> print(moments["mean"], moments["var"], moments["count"])
      [4.] [10.] [4.]
      >>> print(bnjax.tools.apply_moments(stats, moments, momentum=0.5)["mean"])
      [2.]

    References:
      Chan, Golub & LeVeque 1983, "Algorithms for Computing the Sample Variance", for the merge.
    """
    stats, gathered = flatten_dict(dict(batch_stats)), flatten_dict(dict(moments))
    for path in sorted({key[:-1] for key in gathered}):
        if (*path, "mean") not in stats:
            raise ValueError(
                f"moments of {'/'.join(path) or 'the top level'} have no statistics to go to: batch_stats holds "
                f"{sorted({'/'.join(key[:-1]) for key in stats})}. Both collections must come from one model."
            )
        running = RunningStats(stats[(*path, "mean")], stats[(*path, "var")])
        new = update_running(running, Moments(*(gathered[(*path, k)] for k in Moments._fields)), momentum=momentum)
        stats |= {(*path, "mean"): new.mean, (*path, "var"): new.var}
    return unflatten_dict(stats)
