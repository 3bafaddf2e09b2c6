"""Evaluation in which the statistics of each example count beside the running averages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from bnjax.functional import Moments, RunningStats
from bnjax.functional._axes import layout_of, statistics_dtype
from bnjax.tools import _trees
from bnjax.tools._layers import Call, described, handling, is_norm, run_module
from bnjax.tools._trees import show

if TYPE_CHECKING:
    import chex


def weigh_examples(
    apply_fn: Callable[..., Any],
    variables: chex.ArrayTree,
    x: Any,
    *,
    weight: float,
    layers: Sequence[str] | None = None,
) -> Any:
    r"""Evaluates a network that was trained with few examples per batch, each example beside the running averages.

    .. math::
        \mathrm{mean}_i = (1 - w)\,\mathrm{mean} + w\,m_i, \qquad
        \mathrm{var}_i = (1 - w)\,\mathrm{var} + w\,v_i + w (1 - w) (m_i - \mathrm{mean})^2

    normalise example i, whose own mean and variance are :math:`m_i` and :math:`v_i`, and none of the others. In a
    training batch of n examples each makes up 1/n of the statistics that normalise it; the running averages of
    evaluation have nothing of it, and the smaller n, the more the two differ. With w = 1/n the above is what the mean
    and variance of a training batch are on average, over all batches that hold this example, where the examples of a
    batch are independent and the running averages are the averages over batches.

    The model runs once, and each layer meets the output of the mixed ones before it. It may run inside `jit`, and the
    result is differentiable.

    Args:
      apply_fn: for linen `apply_fn(variables, x)`, such as `functools.partial(model.apply, train=False)`; for an nnx
        module `apply_fn(module, x)`. Batch normalization runs in evaluation, whatever mode it asks for.
      variables: linen variables, or an nnx module, which stays as it is; with statistics of any shapes.
      x: what `apply_fn` takes. The first axis of each layer's input must be that of the examples.
      weight: w, in [0, 1]; 1/n for batches of n in training. 0 evaluates as usual, 1 by the example alone.
      layers: patterns of the layers in which examples count; all by default. The others evaluate as usual.

    Returns:
      What `apply_fn` returns. A channel in which no row of an example counts, or not all of them are finite, is
      normalised by the running averages alone, and so is a layer whose statistics are constants (FrozenBatchNorm).

    Raises:
      ValueError: a weight outside [0, 1]; no statistics in the tree; a layer whose class does not say what it computes,
        whose channels are on the first axis, or that keeps several sets of statistics.

    Examples:
      >>> import functools, jax, jax.numpy as jnp, bnjax
      >>> from bnjax import tools
      >>> norm, x = bnjax.linen.BatchNorm(), jnp.array([[[3.0], [5.0]], [[0.0], [2.0]]])  # examples, positions, channel
      >>> variables = norm.init(jax.random.key(0), x, use_running_average=True)  # mean 0, variance 1
      >>> evaluate = functools.partial(norm.apply, use_running_average=True)
      >>> y = tools.weigh_examples(evaluate, variables, x, weight=0.5)
      >>> print(*(f"{value:.2f}" for value in y[0].ravel()))  # by mean 2 and variance 5
      0.45 1.34

    References:
      Summers & Dinneen 2020, "Four Things Everyone Should Know to Improve Batch Normalization",
      https://arxiv.org/abs/1906.03548 (inference example weighing). Singh & Shrivastava 2019, "EvalNorm: Estimating
      Batch Normalization Statistics for Evaluation", https://arxiv.org/abs/1904.06031.

    Differences: the program of the first (https://github.com/ceciliaresearch/four_things_batch_norm) averages E[x²]
    over examples, so that its variance is that of the population, and not the average of those of the batches; its
    weight is an option as here. The second estimates the weights, in training or after it, which is not done here.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight is that of an example in its statistics and must be in [0, 1]; got {weight!r}.")
    _trees.select(_trees.flatten_with_layers(variables).layers, layers)
    patterns = _trees.check_patterns(layers)

    def run(call: Call) -> jax.Array:
        if not is_norm(call.module):
            return call.run(call.x)
        named = patterns is None or any(_trees.matches(call.path, p) for p in patterns)
        return call.run_on_running_average(_weighed(call, weight) if named else call.x)

    with handling(run, key=("weigh examples", weight, patterns)):
        if isinstance(variables, nnx.Module):
            return run_module(apply_fn, *nnx.split(variables), x)[0]
        return apply_fn(variables, x)


def _weighed(call: Call, weight: float) -> jax.Array:
    """Returns the input for which evaluation by the running averages is that of `call.x` by the mixed statistics."""
    says, x, axis, mask = described(call.module, call.path), call.x, getattr(call.module, "axis", -1), None
    if says.is_constant:
        return x
    layout, running = layout_of(x, axis), _running(call)
    affine = partial(says.evaluation_affine, scale=None, bias=None, epsilon=call.module.epsilon)
    a, c = affine(running)

    def of_one(x: jax.Array, mask: jax.Array | None) -> jax.Array:
        x, mask = x[None], None if mask is None else mask[None]
        new_a, new_c = affine(_mixed(running, says.averaged_moments(x, axis=axis, mask=mask), weight))
        wide = x.astype(statistics_dtype(x, a, c))
        return (layout.expand(new_a / a) * wide + layout.expand((new_c - c) / a))[0].astype(x.dtype)

    if call.options.get("mask") is not None:
        mask = jnp.broadcast_to(call.options["mask"], x.shape)
    return jax.vmap(of_one, (0, None if mask is None else 0))(x, mask)


def _running(call: Call) -> RunningStats:
    """Returns the running averages of a layer in the shape of its channels; raises ValueError where they do not fit."""
    layout, held = layout_of(call.x, getattr(call.module, "axis", -1)), call.stats()
    if 0 in layout.features:
        raise ValueError(f"{show(call.path)} has its channels on the first axis, which must be that of the examples.")
    if held.mean.size != math.prod(layout.shape):
        raise ValueError(
            f"the statistics of {show(call.path)} have shape {held.mean.shape}, its input has channels {layout.shape}: "
            "layers that keep more than one set cannot mix in those of an example. Name the others in layers=[...]."
        )
    return RunningStats(*(v.reshape(layout.shape) for v in held[:2]))


def _mixed(running: RunningStats, example: Moments, weight: float) -> RunningStats:
    """Returns the mean and variance of a mixture in which the example has this weight."""
    good = (example.count > 0) & jnp.isfinite(example.mean) & jnp.isfinite(example.var)
    apart = jnp.abs(example.mean - running.mean) ** 2
    mean = (1 - weight) * running.mean + weight * example.mean
    var = (1 - weight) * running.var + weight * example.var + weight * (1 - weight) * apart
    return RunningStats(jnp.where(good, mean, running.mean), jnp.where(good, var, running.var))
