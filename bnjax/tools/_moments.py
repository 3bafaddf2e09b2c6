"""The moments of the input of every batch normalization layer in one run of a model."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state

from bnjax.functional import Moments, RunningStats, merge_moments
from bnjax.functional._axes import layout_of
from bnjax.functional._collectives import group_of, group_size
from bnjax.functional._merge import moments_for_running
from bnjax.tools import _trees
from bnjax.tools._layers import Call, Program, described, handling, is_norm
from bnjax.tools._trees import Path, show

Settled = Mapping[Path, jax.Array | bool]


class Found(NamedTuple):
    """What one run of a model shows."""

    moments: dict[Path, Moments]  # in the order in which the layers run
    constant: frozenset[Path]  # the layers whose statistics are not to be changed


def layer_moments(model: Program, state: Any, batch: Any, settled: Settled) -> Found:
    """Moments of the input of each layer: about zero, with mean 0, where the layer keeps those.

    Args:
      model: the program.
      state: its variables.
      batch: its input.
      settled: whether a layer normalises by its running averages, or (the default) by the batch.

    The moments leave the model where its statistics do, in the place of the updated ones: so they pass through scan,
    vmap, remat and shard_map as the model's author arranged it for training. The count has no such place. It is known
    when the model is traced, or else, where there are masks, it takes the place of the mean in a second run, whose
    arithmetic the compiler finds to be that of the first.
    """
    first = _Recorder(settled, counting=False)
    stats = first.updated(model, state, batch)
    counts = {layer: jnp.full_like(stats[layer]["var"], rows) for layer, rows in first.rows.items()}
    if first.masked:
        again = _Recorder(settled, counting=True).updated(model, state, batch)
        counts = {layer: again[layer]["mean"].real for layer in first.rows}
    found = {layer: _finite(Moments(stats[layer]["mean"], stats[layer]["var"], counts[layer])) for layer in first.rows}
    return Found(found, frozenset(first.constant))


def _finite(moments: Moments) -> Moments:
    """Channels whose moments are not finite count nothing."""
    mean, var = (s.astype(jnp.promote_types(s.dtype, jnp.float32)) for s in (moments.mean, moments.var))
    good = jnp.isfinite(mean) & jnp.isfinite(var)
    return Moments(mean, var, jnp.where(good, moments.count.astype(var.dtype), 0))


class _Recorder:
    """Puts the moments of each layer's input where its running averages are."""

    def __init__(self, settled: Settled, *, counting: bool):
        self.settled, self.counting = settled, counting
        self.rows: dict[Path, int] = {}  # without masks; in the order in which the layers run
        self.masked = False
        self.constant: set[Path] = set()
        self._earlier: dict[Path, tuple[Any, tuple[jax.Array, jax.Array], Moments]] = {}

    def updated(self, model: Program, state: Any, batch: Any) -> dict[Path, dict[str, jax.Array]]:
        """The statistics after a run of the model under this recorder."""
        with handling(self._record):
            result = model.run(state, batch)
        if not (isinstance(result, tuple) and len(result) == 2):
            raise ValueError(
                "apply_fn must return (output, updates), updates holding the statistics; got "
                f"{type(result).__name__}. For linen: functools.partial(model.apply, mutable=['batch_stats'])."
            )
        tree = _trees.flatten_with_layers(result[1])
        return {layer: tree.stats(layer) for layer in tree.layers}

    def _record(self, call: Call) -> jax.Array:
        if not is_norm(call.module):
            return call.run(call.x)
        mask = call.options.get("mask")
        running, moments, pooled = self._observe(call, mask)
        use = self.settled.get(call.path, False)
        if described(call.module, call.path).is_constant:
            use = True
            self.constant.add(call.path)
        call.store(RunningStats(*(jnp.where(use, a, b) for a, b in zip(running, moments[:2], strict=True))))
        y = call.run_on_running_average(call.x if mask is None else _fill(call, mask, moments.mean))
        call.store(RunningStats(pooled.count if self.counting else pooled.mean, pooled.var))
        return y

    def _observe(self, call: Call, mask: jax.Array | None) -> tuple[tuple[jax.Array, jax.Array], Moments, Moments]:
        """The running averages of a layer, the moments of this call, and those with earlier calls in this run."""
        names = (call.module.axis_name, call.module.axis_index_groups)
        layout = layout_of(call.x, call.module.axis)
        rows = math.prod(call.x.shape[a] for a in layout.rows) * group_size(group_of(*names, call.x.shape))
        moments = described(call.module, call.path).averaged_moments(
            call.x, axis=call.module.axis, mask=mask, axis_name=names[0], axis_index_groups=names[1]
        )
        everybody = getattr(call.module, "stats_axis_name", None)
        # nnx keeps the statistics of several feature axes flat
        mean, var, *_ = call.stats()
        if mean.size != math.prod(layout.shape):
            raise ValueError(
                f"the statistics of {show(call.path)} have shape {mean.shape}, its input has channels {layout.shape}: "
                "layers that keep more than one set cannot be recalibrated. Name the others in layers=[...] and leave "
                "its calls out of apply_fn."
            )
        running, pooled = (mean.reshape(layout.shape), var.reshape(layout.shape)), moments
        if everybody is not None:  # more devices share the running averages than normalise together
            pooled = moments_for_running(
                moments,
                running[0],
                shape=call.x.shape,
                axis_name=names[0],
                stats_axis_name=everybody,
                axis_index_groups=names[1],
            )
        trace = get_opaque_trace_state(convention="flax")
        earlier = self._earlier.get(call.path)
        if earlier is not None and earlier[0] == trace:  # a body that is traced twice (scan) is no second call
            running, pooled = earlier[1], merge_moments(earlier[2], pooled)
            rows += self.rows[call.path]
        self._earlier[call.path] = (trace, running, pooled)
        self.rows[call.path], self.masked = rows, self.masked or mask is not None or everybody is not None
        return running, moments, pooled


def _fill(call: Call, mask: jax.Array, mean: jax.Array) -> jax.Array:
    """The input, with NaN and Inf at masked positions read as the mean, as in training."""
    mean = layout_of(call.x, call.module.axis).expand(mean)
    mask = mask.reshape((1,) * (call.x.ndim - mask.ndim) + mask.shape)
    return jnp.where((mask > 0) | jnp.isfinite(call.x), call.x, mean.astype(call.x.dtype))
