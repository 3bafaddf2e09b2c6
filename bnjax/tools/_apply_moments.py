"""One update of the running averages from moments that were gathered over several calls."""

from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax.functional import Moments, RunningStats, update_running
from bnjax.functional._running import Momentum
from bnjax.tools import _trees


def apply_moments(
    batch_stats: Mapping[str, Any],
    moments: Mapping[str, Any],
    *,
    momentum: Momentum = 0.99,
    debias: bool = False,
    unbiased_var: bool = False,
) -> dict[str, Any]:
    r"""Updates the running averages of every layer by moments that were gathered over several calls.

    .. math:: \mathrm{mean} \leftarrow m\,\mathrm{mean} + (1 - m)\,\mathrm{mean}_\text{gathered}, \qquad
              \mathrm{var} \leftarrow m\,\mathrm{var} + (1 - m)\,\mathrm{var}_\text{gathered}

    For gradient accumulation: call the model with `update_stats=False` and `mutable=["moments"]`, pass the collection
    `moments` on from micro-batch to micro-batch, and apply it once per optimizer step. The moments are those of all the
    micro-batches together, the variance of their means included.

    Args:
      batch_stats: the linen collection, `{mean, var}` per layer, each `[C]`; with `steps` where they are counted.
      moments: the collection of that name that :class:`bnjax.linen.BatchNorm` fills, `{mean, var, count}` per layer.
        Layers without moments keep their averages.
      momentum: the weight of the OLD values, or a function or None, as the layers have it.
      debias: as the layers have it.
      unbiased_var: as the layers have it.

    Returns:
      The new `batch_stats`.

    Raises:
      ValueError: no statistics in the tree, moments of a layer that has none, or as :func:`bnjax.update_running`.

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
    _trees.flatten_with_layers(batch_stats)
    stats, gathered = flatten_dict(dict(batch_stats)), flatten_dict(dict(moments))
    options: dict[str, Any] = dict(momentum=momentum, debias=debias, unbiased_var=unbiased_var)
    for path in sorted({key[:-1] for key in gathered}):
        if (*path, "mean") not in stats:
            raise ValueError(
                f"moments of {'/'.join(path) or 'the top level'} have no statistics to go to: batch_stats holds "
                f"{sorted({'/'.join(key[:-1]) for key in stats})}. Both collections must come from one model."
            )
        running = RunningStats(*(stats.get((*path, k)) for k in RunningStats._fields))
        new = update_running(running, Moments(*(gathered[(*path, k)] for k in Moments._fields)), **options)
        stats |= {(*path, k): value for k, value in new._asdict().items() if value is not None}
    return unflatten_dict(stats)
