"""Applies the scale and bias of a layer, which are per channel or differ from example to example.

    y = xhat·(offset + scale) + bias

Per-channel scale and bias are fused into the normalization and its derivative; per-example ones are applied afterwards
as ordinary operations.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bnjax.functional import _axes


class Affine(NamedTuple):
    """Holds scale and bias: pass `core` to the normalization as keyword arguments, and its y to `finish`."""

    scale: jax.Array | None  # per channel [C]; else broadcastable to x
    bias: jax.Array | None
    per_channel: bool
    dtype: np.dtype  # of the output

    @property
    def core(self) -> dict[str, Any]:
        """Returns the keyword arguments scale, bias and dtype of `batch_norm` and `normalize`.

        Per-example scale and bias are left to `finish`; y then has the dtype of the statistics, so that it is rounded
        once, after they are applied.
        """
        if self.per_channel:
            return dict(scale=self.scale, bias=self.bias, dtype=self.dtype)
        return dict(scale=None, bias=None, dtype=_axes.statistics_dtype(jnp.empty((), self.dtype)))

    def finish(self, y: jax.Array) -> jax.Array:
        """Applies per-example scale and bias to y and returns it in the output dtype; returns y as it is otherwise."""
        if self.per_channel:
            return y
        y = y if self.scale is None else y * self.scale.astype(y.dtype)
        y = y if self.bias is None else y + self.bias.astype(y.dtype)
        return y.astype(self.dtype)


def affine_of(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    axis: int | Sequence[int] = -1,
    offset: float = 0.0,
    dtype: jax.typing.DTypeLike | None = None,
) -> Affine:
    """Checks scale and bias against x, and returns them with the dtype of the output.

    Args:
      x: `[..., C]`.
      scale, bias: `[C]`, or broadcastable to x with its rank (`[N, 1, 1, C]`: one for each example), or None.
      axis: the feature axis or axes of x.
      offset: added to scale, in float32 at least: with 1 the layer multiplies by 1 + scale.
      dtype: of the output; by default the promotion of x, scale and bias.

    Raises:
      ValueError: scale or bias has neither of the two shapes.
    """
    x = _axes.as_input(x)
    layout = _axes.layout_of(x, axis)
    scale, bias = _fitting("scale", scale, x, layout), _fitting("bias", bias, x, layout)
    dtype = _axes.output_dtype(dtype, x, scale, bias)
    if scale is not None and offset:
        scale = scale.astype(_axes.statistics_dtype(scale)) + offset
    per_channel = all(v is None or v.shape == layout.shape for v in (scale, bias))
    if not per_channel:
        scale, bias = (v if v is None or v.ndim == x.ndim else layout.expand(v) for v in (scale, bias))
    return Affine(scale, bias, per_channel, dtype)


def _fitting(name: str, v: jax.Array | None, x: jax.Array, layout: _axes.Layout) -> jax.Array | None:
    """Returns a scale or bias as an array; raises ValueError unless it is per channel or broadcastable to x."""
    if v is None:
        return None
    v = _axes.as_array(name, v)
    fits = v.ndim == x.ndim and all(m in (1, n) for m, n in zip(v.shape, x.shape, strict=True))
    if v.shape != layout.shape and not fits:
        per_example = tuple(1 if a in layout.rows[1:] else n for a, n in enumerate(x.shape))
        raise ValueError(
            f"{name} must be per channel, {layout.shape}, or have the rank of x and be broadcastable to it, such as "
            f"{per_example}; got {v.shape} for x {x.shape} with feature axes {layout.features}."
        )
    return v
