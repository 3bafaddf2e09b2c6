"""Running statistics as part of a tree: merge, reset, copy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from bnjax.functional import Moments, merge_moments
from bnjax.tools import _trees
from bnjax.tools._trees import Path, Tree, show

if TYPE_CHECKING:
    import chex


def merge_stats(parts: Any, *, counts: Sequence[float] | None = None, axis: int | None = None) -> Any:
    r"""Merges statistics that diverged, of replicas, hosts or averaged checkpoints, into those of all rows together.

    .. math::
        n = \sum n_i, \qquad \mathrm{mean} = \frac1n \sum n_i m_i, \qquad
        \mathrm{var} = \frac1n \sum n_i \bigl(v_i + (m_i - \mathrm{mean})^2\bigr)

    The average of the variances alone forgets the variance of the means: replicas of variance 1 whose means lie at
    −1 and 1 have variance 2 together. Only statistics are merged; every other leaf is that of the first part.

    Args:
      parts: a sequence of trees of one structure with statistics `[C]`; or, with `axis`, one tree whose statistics
        have an axis over the parts, `[R, C]`, as `pmap` and `process_allgather` make them.
      counts: how many rows, or steps, stand behind each part, `[R]`; equal ones by default. A part of count 0 takes no
        part, even where it holds NaN.
      axis: the axis of the statistics that runs over the parts. Leaves that are not statistics stay as they are.

    Returns:
      A tree of the structure of one part, with statistics in the dtypes they had.

    Raises:
      ValueError: no parts, or no statistics in them; layers, shapes or counts that do not fit together.

    Examples:
      >>> import jax.numpy as jnp
      >>> from bnjax import tools
      >>> one = {"bn": {"mean": jnp.array([-1.0]), "var": jnp.array([1.0])}}
      >>> two = {"bn": {"mean": jnp.array([1.0]), "var": jnp.array([1.0])}}
      >>> tools.merge_stats([one, two])
      {'bn': {'mean': Array([0.], dtype=float32), 'var': Array([2.], dtype=float32)}}
      >>> replicas = {"bn": {"mean": jnp.array([[-1.0], [1.0]]), "var": jnp.array([[1.0], [1.0]])}}
      >>> tools.merge_stats(replicas, counts=[3, 1], axis=0)["bn"]["mean"]
      Array([-0.5], dtype=float32)

    References:
      Chan, Golub & LeVeque 1983, "Algorithms for Computing the Sample Variance".
    """
    if axis is not None:
        tree = _trees.flatten_with_layers(parts)
        stats = {layer: _unstack(layer, tree.stats(layer), axis) for layer in tree.layers}
    else:
        trees = _alike(parts)
        tree = trees[0]
        stats = {layer: [t.stats(layer) for t in trees] for layer in tree.layers}
    sizes = {len(s) for s in stats.values()}
    if len(sizes) != 1:
        raise ValueError(f"axis={axis} must run over the same parts in every layer; got sizes {sorted(sizes)}.")
    weights = _weights(counts, sizes.pop())
    return tree.replace({layer: _merge(s, weights) for layer, s in stats.items()})


def _unstack(layer: Path, stacked: dict[str, jax.Array], axis: int) -> list[dict[str, jax.Array]]:
    mean = stacked["mean"]
    if not -mean.ndim <= axis < mean.ndim or mean.ndim < 2:
        raise ValueError(
            f"axis={axis} must be an axis of the statistics besides the channels'; those of {show(layer)} have shape "
            f"{mean.shape}. For a sequence of trees leave axis out."
        )
    return [{role: jnp.take(s, i, axis) for role, s in stacked.items()} for i in range(mean.shape[axis])]


def _alike(parts: Any) -> list[Tree]:
    """Returns the parts, flattened, once it is clear that they hold the same layers in the same shapes."""
    if not isinstance(parts, (list, tuple)) or not parts:
        raise ValueError(f"parts must be a non-empty sequence of trees (or give axis=); got {type(parts).__name__}.")
    trees = [_trees.flatten_with_layers(part) for part in parts]
    for tree in trees[1:]:
        _check_layers(trees[0], tree)
    return trees


def _weights(counts: Sequence[float] | None, parts: int) -> list[float]:
    weights = [1.0] * parts if counts is None else [float(n) for n in counts]
    if len(weights) != parts or not all(n >= 0 and np.isfinite(n) for n in weights) or sum(weights) == 0:
        raise ValueError(
            f"counts must be {parts} non-negative numbers, one for each part, and not all zero; got {counts!r}."
        )
    return weights


def _merge(parts: Sequence[dict[str, jax.Array]], counts: Sequence[float]) -> dict[str, jax.Array]:
    def moments(part: dict[str, jax.Array], count: float) -> Moments:
        mean, var = (
            jnp.asarray(s, jnp.promote_types(jnp.result_type(s), jnp.float32)) for s in (part["mean"], part["var"])
        )
        return Moments(mean, var, jnp.full_like(var, count))

    merged = merge_moments(*map(moments, parts, counts))
    stats = {"mean": merged.mean, "var": merged.var}
    for counter in ("steps", "skipped"):  # the batches behind the merged average are those behind its parts
        if all(counter in part for part in parts):
            stats[counter] = sum((p[counter] for p, n in zip(parts, counts, strict=True) if n > 0), jnp.zeros(()))
    return stats


def reset_stats(
    variables: chex.ArrayTree, *, layers: Sequence[str] | None = None, statistics: Sequence[str] = _trees.STATISTICS
) -> Any:
    r"""Resets statistics: :math:`\mathrm{mean} = 0, \mathrm{var} = 1`, and no steps or skipped batches counted.

    Args:
      variables: a tree with statistics of any shapes.
      layers: patterns of layers, such as `"block1/*"`; all by default.
      statistics: which of `mean`, `var`, `steps` and `skipped`; `["skipped"]` starts that count again and no more.

    Returns:
      The tree, with those statistics of those layers reset and all else untouched.

    Raises:
      ValueError: no statistics in the tree, a pattern that fits no layer, or another name of a statistic.

    Examples:
      >>> import jax.numpy as jnp
      >>> from bnjax import tools
      >>> tools.reset_stats({"bn": {"mean": jnp.array([3.0]), "var": jnp.array([7.0])}})
      {'bn': {'mean': Array([0.], dtype=float32), 'var': Array([1.], dtype=float32)}}
    """
    tree = _trees.flatten_with_layers(variables)
    if isinstance(statistics, str) or not set(statistics) <= set(_trees.STATISTICS):
        raise ValueError(f"statistics must be some of {_trees.STATISTICS}, in a sequence; got {statistics!r}.")

    def start(role: str, old: jax.Array) -> jax.Array:
        return jnp.ones_like(old) if role == "var" else jnp.zeros_like(old)

    chosen = _trees.select(tree.layers, layers)
    return tree.replace(
        {layer: {r: start(r, old) for r, old in tree.stats(layer).items() if r in statistics} for layer in chosen}
    )


def copy_stats(
    source: chex.ArrayTree, target: chex.ArrayTree, *, layers: Sequence[str] | None = None, steps: float | None = None
) -> Any:
    r"""Returns `target` with the statistics of `source`.

    .. math:: \mathrm{mean}_\text{target} = \mathrm{mean}_\text{source}, \quad
              \mathrm{var}_\text{target} = \mathrm{var}_\text{source}

    `copy_stats(before, after, layers=["block1/*"])` after a training step keeps the statistics of some layers as they
    were before it; it may run inside `jit`. Which statistics normalise is the module's business: see
    :func:`frozen_norms`.

    A checkpoint of Flax's layers, or of a model with a plain momentum, does not count batches. Where the layers of
    `target` do (`momentum=None`, a schedule, `debias`), say how many the loaded averages stand for.

    Args:
      source: a tree with statistics of any shapes; it may be another kind of tree than `target` (one collection, all
        the variables, a state) as long as the layers have the same paths. Its statistics may have axes of size one
        besides: AlgoPerf's checkpoints keep them as `(1, 1, C)`, and layers take `(C,)`.
      target: the tree to copy into.
      layers: patterns of layers, such as `"block1/*"`; all the layers of `target` by default.
      steps: how many batches the averages stand for, where `target` counts them and `source` does not. With 0 the next
        batch replaces them, where the plain average or `debias` is asked for.

    Returns:
      `target` with the chosen statistics replaced, in its own dtypes.

    Raises:
      ValueError: no statistics in one of the trees; a layer of other shape or that `source` lacks; a pattern that
        fits no layer; `steps` that only `target` counts and that are not given.

    Examples:
      >>> import jax.numpy as jnp
      >>> from bnjax import tools
      >>> source = {"bn": {"mean": jnp.array([3.0]), "var": jnp.array([7.0])}}
      >>> target = {"params": {"bn": {"scale": jnp.array([2.0])}}, "batch_stats": tools.reset_stats(source)}
      >>> tools.copy_stats(source, target)["batch_stats"]
      {'bn': {'mean': Array([3.], dtype=float32), 'var': Array([7.], dtype=float32)}}
      >>> counting = {"bn": {**tools.reset_stats(source)["bn"], "steps": jnp.zeros(1)}}
      >>> tools.copy_stats(source, counting, steps=1000)["bn"]["steps"]
      Array([1000.], dtype=float32)
    """
    here, there = _trees.flatten_with_layers(source), _trees.flatten_with_layers(target)
    chosen = _trees.select(there.layers, layers)
    _check_layers(here, there, chosen, squeezed=True)
    uncounted = [layer for layer in chosen if "steps" in there.layers[layer] and "steps" not in here.layers[layer]]
    if steps is None and uncounted:
        raise ValueError(
            f"the layers {[show(layer) for layer in uncounted]} of target count the batches behind their averages, and "
            "source does not say how many there are: pass steps=, such as the number of training steps; with steps=0 "
            "the next batch replaces averages that weigh batches by their number."
        )
    counts = {layer: {"steps": jnp.full_like(there.stats(layer)["steps"], steps or 0)} for layer in uncounted}
    shaped = {layer: _shaped(here.stats(layer), there.stats(layer)["mean"].shape) for layer in chosen}
    return there.replace({layer: {**shaped[layer], **counts.get(layer, {})} for layer in chosen})


def _shaped(stats: dict[str, jax.Array], shape: tuple[int, ...]) -> dict[str, jax.Array]:
    """Returns statistics in a shape of as many elements, where they have axes of size one besides."""
    return {role: s.reshape(shape) if s.size == math.prod(shape) else s for role, s in stats.items()}


def _check_layers(here: Tree, there: Tree, layers: Sequence[Path] | None = None, *, squeezed: bool = False) -> None:
    """Raises ValueError unless both trees hold the layers (all of them, by default), in the same shapes.

    With `squeezed` axes of size one do not count.
    """
    wanted = set(here.layers) | set(there.layers) if layers is None else set(layers)
    for layer in sorted(wanted):
        shapes = [t.stats(layer)["mean"].shape if layer in t.layers else "none" for t in (here, there)]
        compared = [tuple(n for n in s if n != 1) if squeezed and s != "none" else s for s in shapes]
        if compared[0] != compared[1]:
            raise ValueError(
                f"the statistics of {show(layer)} do not correspond: {shapes[0]} in one tree, {shapes[1]} in the "
                "other. The trees must come from one model, at one depth."
            )
