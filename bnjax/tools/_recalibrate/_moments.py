"""The moments of the input of every batch normalization layer, gathered while the model runs.

Meanwhile the two statistics of a layer, each `[..., C]`, are wider: `[..., C, 1, 6]`, with the running averages in the
first columns and the moments of all calls so far in others. Each call merges its own into them. So they pass through
scan, vmap, remat, shard_map and jit as the model's author arranged it for the running averages, and a layer that a loop
runs again finds there what it left.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from bnjax.functional import Moments, RunningStats, merge_moments
from bnjax.functional._axes import layout_of, statistics_dtype
from bnjax.functional._collectives import match
from bnjax.functional._merge import moments_for_running
from bnjax.tools import _trees
from bnjax.tools._layers import Call, described, handling, is_norm, unsaid
from bnjax.tools._trees import Path, Tree, show

# Marks in the traced program where a layer runs, followed by its path.
MET, CONSTANT = "moments of ", "constant statistics of "

_COLUMNS = 6
# In which dtype the layer keeps its mean, told by the number of columns: empty ones are added.
_KEPT = tuple(map(np.dtype, ("float32", "float64", "complex64", "complex128")))


class Gathered(NamedTuple):
    """What a layer holds while moments are gathered, each `[..., C]`."""

    running: RunningStats
    weight: Any  # of the running averages in the statistics that normalise: 1 in evaluation, 0 in training
    moments: Moments  # of all calls so far
    calls: Any
    constant: Any  # 1 where the layer says that nothing changes its statistics
    double: Any  # 1 where the moments were computed in float64
    imaginary: Any  # 1 where their mean is complex


def widened(tree: Tree, weights: Mapping[Path, jax.Array]) -> Any:
    """Returns the variables with room for the moments of some layers, which have met no call yet.

    Args:
      tree: the variables.
      weights: for each of these layers the weight of its running averages in the statistics that normalise, a scalar.
    """
    leaves = list(tree.leaves)
    for layer, weight in weights.items():
        mean, var = (jnp.asarray(leaves[tree.layers[layer][role]]) for role in ("mean", "var"))
        none = jnp.zeros_like(var, float)  # float64 where JAX has it
        weights_of_all = none + weight.astype(none.dtype)
        start = Gathered(RunningStats(mean, var), weights_of_all, Moments(none, none, none), *[none] * 4)
        kept = statistics_dtype(mean)
        for role, columns in zip(("mean", "var"), _packed(start, kept), strict=True):
            leaves[tree.layers[layer][role]] = columns
    return tree.build(leaves)


def gather(run: Callable[[Any, Any], Any], state: Any, batch: Any, *, others_train: bool) -> Tree:
    """Runs a model whose variables are widened; returns its variables afterwards, for :func:`gathered`.

    Args:
      run: `run(state, batch)` returns the output and the variables after it.
      state: the variables.
      batch: the input.
      others_train: whether layers that are not widened normalise by the batch, instead of by their running averages.
    """
    # The handler goes by the variables, so that these keys in the cache of jit are right for every model.
    with handling(partial(_record, others_train), key=("gather moments", others_train)):
        result = run(state, batch)
    if not (isinstance(result, tuple) and len(result) == 2):
        raise ValueError(
            "apply_fn must return (output, updates), updates holding the statistics; got "
            f"{type(result).__name__}. For linen: functools.partial(model.apply, mutable=['batch_stats'])."
        )
    return _trees.flatten_with_layers(result[1])


def gathered(stats: Mapping[str, Any], *, is_complex: bool) -> Gathered:
    """Returns what is in the widened `mean` and `var` of a layer, JAX's arrays or NumPy's."""
    mean, var = stats["mean"], stats["var"]
    re, im, moments_re, moments_im, weight, constant = (mean[..., 0, i] for i in range(_COLUMNS))
    run_var, moments_var, count, calls, double, imaginary = (var[..., 0, i] for i in range(_COLUMNS))
    kept_complex = np.issubdtype(_kept_dtype(mean), np.complexfloating)
    running = RunningStats(re + 1j * im if kept_complex else re, run_var)
    moments = Moments(moments_re + 1j * moments_im if is_complex else moments_re, moments_var, count)
    return Gathered(running, weight, moments, calls, constant, double, imaginary)


def _kept_dtype(mean: Any) -> Any:
    return _KEPT[mean.shape[-1] - _COLUMNS]


def _is_widened(mean: jax.Array) -> bool:
    return mean.ndim > 2 and mean.shape[-2] == 1 and mean.shape[-1] - _COLUMNS in range(len(_KEPT))


def _packed(g: Gathered, kept: Any) -> tuple[jax.Array, jax.Array]:
    """Puts everything side by side behind the channels, in as many columns as tell the dtype of the kept mean."""
    running, moments = g.running, g.moments
    of_mean = (running.mean.real, running.mean.imag, moments.mean.real, moments.mean.imag, g.weight, g.constant)
    of_var = (running.var, moments.var, moments.count, g.calls, g.double, g.imaginary)
    empty = [jnp.zeros_like(moments.count)] * _KEPT.index(kept)

    def side_by_side(columns: tuple[jax.Array, ...]) -> jax.Array:
        return jnp.stack([*(c.astype(moments.count.dtype) for c in columns), *empty], -1)[..., None, :]

    return side_by_side(of_mean), side_by_side(of_var)


def _record(others_train: bool, call: Call) -> jax.Array:
    """Runs a call of a layer by the statistics that its weight asks for, and merges the moments of its input."""
    if not is_norm(call.module):
        return call.run(call.x)
    held = call.stats()
    wide = _is_widened(held.mean)
    if not wide and unsaid(call.module):
        return call.run(call.x)
    if not (wide or others_train):
        return call.run_on_running_average(call.x)
    says, mask = described(call.module, call.path), call.options.get("mask")
    own, pooled = _moments_of(call, mask, held)
    before = gathered(held._asdict(), is_complex=jnp.iscomplexobj(own.mean)) if wide else None
    running = RunningStats(*(v.reshape(own.mean.shape) for v in (before.running if before else held)[:2]))
    weight = jnp.zeros_like(running.var) if before is None else before.weight.reshape(own.mean.shape)
    weight = jnp.ones_like(weight) if says.is_constant else weight
    call.store(_mixed(running, own, weight, _kept_dtype(held.mean) if wide else held.mean.dtype))
    x = checkpoint_name(call.x, (CONSTANT if says.is_constant else MET) + show(call.path))
    y = call.run_on_running_average(x if mask is None else _filled(call, mask, own.mean))
    call.store(held if before is None else _merged(before, pooled, held, says.is_constant))
    return y


def _merged(before: Gathered, pooled: Moments, held: RunningStats, is_constant: bool) -> RunningStats:
    """Returns the widened statistics of a layer after one more call, whose input has the moments `pooled`."""
    shape = before.calls.shape  # flat in nnx where there are several feature axes
    double, imaginary = pooled.var.dtype == jnp.float64, jnp.iscomplexobj(pooled.mean)
    pooled = Moments(*(v.reshape(shape).astype(statistics_dtype(v, before.calls)) for v in pooled))
    after = before._replace(
        moments=merge_moments(before.moments, pooled),
        calls=before.calls + 1,
        constant=jnp.full_like(before.calls, is_constant),
        double=jnp.full_like(before.calls, double),
        imaginary=jnp.full_like(before.calls, imaginary),
    )
    mean, var = _packed(after, _kept_dtype(held.mean))
    return RunningStats(match(mean, held.mean), match(var, held.var))


def _moments_of(call: Call, mask: jax.Array | None, held: RunningStats) -> tuple[Moments, Moments]:
    """Returns the moments of a layer's input: of those that normalise together, and for the running averages."""
    module, x = call.module, call.x
    groups: dict[str, Any] = {name: getattr(module, name, None) for name in ("axis_name", "axis_index_groups")}
    axis = getattr(module, "axis", -1)
    own = described(module).averaged_moments(x, axis=axis, mask=mask, **groups)
    shape = held.mean.shape[:-2] if _is_widened(held.mean) else held.mean.shape
    if math.prod(shape) != math.prod(layout_of(x, axis).shape):
        raise ValueError(
            f"the statistics of {show(call.path)} have shape {shape}, its input has channels "
            f"{layout_of(x, axis).shape}: layers that keep more than one set cannot be recalibrated. Name the others "
            "in layers=[...]."
        )
    everybody = getattr(module, "stats_axis_name", None)
    if everybody is None:
        return own, own
    # more devices share the running averages than normalise together
    return own, moments_for_running(own, own.mean, shape=x.shape, stats_axis_name=everybody, **groups)


def _mixed(running: RunningStats, batch: Moments, weight: jax.Array, kept: Any) -> RunningStats:
    """Returns the statistics that normalise: running averages, moments of the batch, or both averaged."""

    def mix(old: jax.Array, new: jax.Array, dtype: Any) -> jax.Array:
        old, new, w = old.astype(dtype), new.astype(dtype), weight.astype(jnp.finfo(dtype).dtype)
        part = jnp.where(w == 0, new, w * old + (1 - w) * new)
        return jnp.where((w == 1) | (batch.count == 0), old, part)  # exact at both ends, where the other may be NaN

    dtype = statistics_dtype(batch.mean, kept)
    return RunningStats(mix(running.mean, batch.mean, dtype), mix(running.var, batch.var, jnp.finfo(dtype).dtype))


def _filled(call: Call, mask: jax.Array, mean: jax.Array) -> jax.Array:
    """Returns the input, with NaN and Inf at masked positions read as the mean, as in training."""
    mean = layout_of(call.x, getattr(call.module, "axis", -1)).expand(mean)
    mask = mask.reshape((1,) * (call.x.ndim - mask.ndim) + mask.shape)
    return jnp.where((mask > 0) | jnp.isfinite(call.x), call.x, mean.astype(call.x.dtype))


def layers_in(jaxpr: Any) -> dict[str, bool]:
    """Returns the names of the layers in a traced program, in the order in which they run; True for constant ones."""
    ran: dict[str, bool] = {}
    for eqn in jaxpr.eqns:
        label = str(eqn.params.get("name", "")) if eqn.primitive.name == "name" else ""
        for start in (MET, CONSTANT):
            if label.startswith(start):
                ran.setdefault(label.removeprefix(start), start == CONSTANT)
        for value in eqn.params.values():
            for item in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(item, "jaxpr", item)
                if hasattr(inner, "eqns"):
                    ran = {**ran, **{k: v for k, v in layers_in(inner).items() if k not in ran}}
    return ran
