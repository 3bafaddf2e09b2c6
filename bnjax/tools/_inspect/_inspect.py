"""A look at every batch normalization layer: what it holds, what is wrong with it, and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path as File
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bnjax.functional import Moments
from bnjax.tools import _trees
from bnjax.tools._inspect._flags import flags_of
from bnjax.tools._inspect._idle import idle
from bnjax.tools._inspect._order import in_order
from bnjax.tools._inspect._show import as_rich, as_text, draw
from bnjax.tools._trees import Path, show

if TYPE_CHECKING:
    import chex

Row = dict[str, Any]


class Inspection(NamedTuple):
    """One row for each layer; `pandas.DataFrame(inspection.rows)`, `print(inspection)`, or a picture of it.

    Attributes:
      rows: a dict for each layer, with the keys and units of :func:`inspect`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from bnjax import tools
      >>> print(tools.inspect({"bn": {"mean": jnp.zeros(3), "var": jnp.full(3, 2.0)}}))
      layer  channels  constant  |mean|/std  var min  var max
      bn            3         0           0        2        2
    """

    rows: list[Row]

    def __str__(self) -> str:
        """Returns a table in plain text, and below it what is wrong."""
        return as_text(self.rows)

    def rich(self) -> Any:
        """Returns the table for `rich.print`, with what is wrong in colour.

        Raises:
          ImportError: rich is not installed.
        """
        return as_rich(self.rows)

    def save_png(self, file: str | File) -> None:
        """Draws drift, scales, variances and idle channels of all layers into one picture.

        Args:
          file: where to write it.

        Raises:
          ImportError: matplotlib is not installed.
        """
        draw(self.rows, File(file))


def inspect(
    variables: chex.ArrayTree,
    moments: Mapping[str, Any] | None = None,
    *,
    epsilon: float | None = None,
    scale_offset: float | None = None,
    replica_axis: int | None = None,
) -> Inspection:
    r"""Returns a table of the batch normalization layers, with what is wrong and what to do in words.

    .. math::
        \mathrm{mean\_drift} = \sqrt{\frac1C \sum_c \frac{(m_c - \mathrm{mean}_c)^2}{\mathrm{var}_c + \epsilon}}, \qquad
        \mathrm{var\_drift} = \sqrt{\frac1C \sum_c \log^2 \frac{v_c + \epsilon}{\mathrm{var}_c + \epsilon}}

    Args:
      variables: a tree with statistics of any shapes: linen variables, an nnx state or an nnx module; with the
        parameters in it the scales are looked at too.
      moments: what the layers met in a training batch, from :func:`collect_moments` or the collection `moments`:
        `mean`, `var`, `count` of the shape of the statistics. They fill the columns `rows`, `mean_drift`, `var_drift`.
      epsilon: of the layers; by default that of each layer of an nnx module, and 1e-5 for other trees.
      scale_offset: of the layers, as `bnjax.BatchNorm` has it; by default likewise, and 0.
      replica_axis: the axis of the statistics that runs over replicas, as after `pmap`; they are compared, and the rest
        of the row is about all of them pooled. Arrays that are replicated over devices are compared without it.

    Returns:
      `Inspection(rows)`, a dict for each layer: `layer`, `channels`, `rows` (the fewest that any channel counted),
      `mean_drift` (in standard deviations), `var_drift` (in nepers: 0.1 is 10 %), `replica_divergence` (the largest
      distance of a replica's mean from that of all, in standard deviations), `constant` and `dead` (channels that put
      out next to nothing, see below), `skipped` (the most batches that a channel refused because they were not finite,
      or of which it took the mean alone because there was one row; where the layer counts them), `mean_over_std`,
      `var_min`, `var_max`, `scale_min`, `scale_median`, `scale_max`, and `flags`, a list of sentences. None where
      nothing is known.

      What a channel puts out has a standard deviation of :math:`|\mathrm{scale}|\sqrt{\mathrm{var} / (\mathrm{var} +
      \epsilon)}`. A channel is idle if that is below 0.001, or if its input or its output varies by less than rounding;
      `constant` counts those whose input is the reason, `dead` those whose scale is.

      The rows are in the order in which the layers run where that is known: from moments, from variables as `init`
      returned them, from the attributes of an nnx module. Otherwise they are in the order of their names.

    Raises:
      ValueError: no statistics in the tree; `moments` of another model; `replica_axis` that is not an axis.

    Examples:
      >>> import jax.numpy as jnp
      >>> from bnjax import tools
      >>> stats = {"bn": {"mean": jnp.array([0.0, 3.0]), "var": jnp.array([1.0, 0.0])}}
      >>> table = tools.inspect({"batch_stats": stats})
      >>> table.rows[0]["constant"]
      1
      >>> table.rows[0]["flags"][0]
      '1 of 2 channels are constant (their input does not vary): it is dead; look at the layer before.'

    References:
      Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", https://arxiv.org/abs/2105.07576.
    """
    tree = _trees.flatten_with_layers(variables)
    met = _trees.by_layer(moments)
    strangers = set(met) - {show(layer) for layer in tree.layers}
    if strangers:
        raise ValueError(
            f"moments has layers {sorted(strangers)} that the variables do not have; theirs are "
            f"{[show(layer) for layer in tree.layers]}. Take both from one model."
        )
    fields, rows = _fields(variables), []
    for layer in in_order(tree.layers, variables, met):
        leaves = {role: tree.leaves[i] for role, i in tree.layers[layer].items()}
        own_epsilon, own_offset = fields.get(layer, (1e-5, 0.0))
        row = _row(
            leaves,
            met.get(show(layer)),
            own_epsilon if epsilon is None else epsilon,
            own_offset if scale_offset is None else scale_offset,
            replica_axis,
        )
        rows.append({"layer": show(layer), **row, "flags": flags_of(row)})
    return Inspection(rows)


def _fields(variables: Any) -> dict[Path, tuple[float, float]]:
    """Returns epsilon and scale_offset of the layers of an nnx module."""
    modules = nnx.iter_modules(variables) if isinstance(variables, nnx.Module) else ()
    return {
        tuple(map(str, path)): (module.epsilon, getattr(module, "scale_offset", 0.0))
        for path, module in modules
        if hasattr(module, "epsilon")
    }


def _row(
    leaves: Mapping[str, jax.Array], moments: Moments | None, epsilon: float, offset: float, replica_axis: int | None
) -> Row:
    means, variances = (_replicas(leaves[role], replica_axis) for role in ("mean", "var"))
    mean, var = means.mean(0), variances.mean(0) + means.var(0)
    std = np.sqrt(np.maximum(var, 0) + epsilon)
    bias, scale = (_of_all(leaves, role, replica_axis) for role in ("bias", "scale"))
    scale = None if scale is None else np.abs(scale + offset)
    unit = float(jnp.finfo(leaves["var"].dtype).eps)
    constant, dead = idle(mean, var, scale, bias, epsilon, unit)
    row: Row = {
        "channels": mean.size,
        "rows": None,
        "mean_drift": None,
        "var_drift": None,
        "replica_divergence": float(np.max(np.abs(means - mean) / std)) if len(means) > 1 else None,
        "constant": int(constant.sum()),
        "skipped": None if "skipped" not in leaves else int(_replicas(leaves["skipped"], replica_axis).max()),
        "dead": None if scale is None else int(dead.sum()),
        "mean_over_std": float(np.max(np.abs(mean) / std)),
        "var_min": float(var.min()),
        "var_max": float(var.max()),
        "scale_min": None if scale is None else float(scale.min()),
        "scale_median": None if scale is None else float(np.median(scale)),
        "scale_max": None if scale is None else float(scale.max()),
        "broken": int(np.sum(~(np.isfinite(mean) & np.isfinite(var) & (var >= 0)))),
        "untouched": bool(np.all(mean == 0) and np.all(var == 1)),
        "var_untouched": bool(np.any(mean != 0) and np.all(var == 1)),
    }
    return row if moments is None else row | _drift(mean, var, moments, epsilon)


def _replicas(leaf: jax.Array, axis: int | None) -> np.ndarray[Any, Any]:
    """Returns the values that the replicas hold, stacked; one where there are no replicas to see."""
    if axis is not None:
        if not -leaf.ndim <= axis < leaf.ndim or leaf.ndim < 2:
            raise ValueError(
                f"replica_axis={axis} must be an axis of the statistics besides the channels'; "
                f"they have shape {leaf.shape}."
            )
        return np.moveaxis(_wide(leaf), axis, 0)
    if isinstance(leaf, jax.Array) and leaf.is_fully_replicated:
        return np.stack([_wide(shard.data) for shard in leaf.addressable_shards])
    return _wide(leaf)[None]


def _of_all(leaves: Mapping[str, jax.Array], role: str, axis: int | None) -> np.ndarray[Any, Any] | None:
    """Returns the scale or bias of a layer, averaged over replicas where each has one."""
    if role not in leaves:
        return None
    leaf = _wide(leaves[role])
    return leaf.mean(axis) if axis is not None and leaf.shape == leaves["mean"].shape else leaf


def _wide(leaf: Any) -> np.ndarray[Any, Any]:
    """Returns an array in float64; the mean of complex inputs in complex128."""
    return np.asarray(leaf, np.complex128 if np.iscomplexobj(leaf) else np.float64)


def _drift(mean: Any, var: Any, moments: Moments, epsilon: float) -> Row:
    m, v, count = map(_wide, moments)
    if m.shape != mean.shape:
        raise ValueError(f"moments of shape {m.shape} do not fit statistics of shape {mean.shape}.")
    var = np.maximum(var, 0) + epsilon
    return {
        "rows": float(count.min()),
        "mean_drift": float(np.sqrt(np.mean(np.abs(m - mean) ** 2 / var))),
        "var_drift": float(np.sqrt(np.mean(np.log((np.maximum(v, 0) + epsilon) / var) ** 2))),
    }
