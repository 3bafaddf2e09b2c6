"""Scale and bias of a layer: its own or given at the call, per channel or different from example to example.

    y = xhat·(offset + scale) + bias

Per channel they belong into the core, whose derivative knows them; per example they can only follow it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bnjax.functional import _axes

Initializer = Callable[..., Any]


class Affine(NamedTuple):
    """Scale and bias, and where they are applied: pass `core` to the normalisation and its y to `finish`."""

    scale: jax.Array | None  # per channel [C]; else broadcastable to x
    bias: jax.Array | None
    per_channel: bool
    dtype: np.dtype  # of the output

    @property
    def core(self) -> dict[str, Any]:
        """The arguments of `batch_norm` and `normalize`; an xhat that is not finished yet is not rounded down."""
        if self.per_channel:
            return dict(scale=self.scale, bias=self.bias, dtype=self.dtype)
        return dict(dtype=jnp.promote_types(self.dtype, jnp.float32))

    def finish(self, y: jax.Array) -> jax.Array:
        if self.per_channel:
            return y
        y = y if self.scale is None else y * self.scale
        y = y if self.bias is None else y + self.bias
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
    """The affine part of a normalisation of x.

    Args:
      x: `[..., C]`.
      scale, bias: `[C]`, or broadcastable to x with its rank (`[N, 1, 1, C]`: one for each example), or None.
      axis: the feature axis or axes of x.
      offset: added to scale, in float32 at least: 1 makes `1 + scale` of it.
      dtype: of the output; by default the promotion of x, scale and bias.

    Raises:
      ValueError: the shape of scale or bias is neither.
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


def own_or_given(name: str, own: jax.Array | None, given: jax.Array | None) -> jax.Array | None:
    """The parameter, or the argument of the call in its place; a parameter that would have no effect is refused."""
    if own is not None and given is not None:
        raise ValueError(
            f"{name} was given at the call, and the layer has one of its own, which would have no effect: "
            f"construct the layer with use_{name}=False."
        )
    return own if given is None else given


def offset_init(scale_init: Initializer, offset: float) -> Initializer:
    """The initializer of a variable that `offset` is added to, so that the sum starts as `scale_init` says."""
    if not offset:
        return scale_init
    return lambda *args, **options: scale_init(*args, **options) - offset


def _fitting(name: str, v: jax.Array | None, x: jax.Array, layout: _axes.Layout) -> jax.Array | None:
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
