"""What follows a normalisation at every position: y = act(y + residual)."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax

from bnjax.functional._affine import Affine
from bnjax.functional._axes import as_array

Activation = Callable[[jax.Array], jax.Array] | None


def as_activation(activation: Activation) -> Activation:
    """The activation; raises TypeError unless it is a function that hashes."""
    if activation is not None and not (callable(activation) and isinstance(activation, Hashable)):
        raise TypeError(f"activation must be a hashable function of arrays, such as jax.nn.relu; got {activation!r}.")
    return activation


def as_residual(residual: jax.Array | None, x: jax.Array) -> jax.Array | None:
    """The residual as an array of the shape of x; raises ValueError for another shape."""
    if residual is None:
        return None
    residual = as_array("residual", residual)
    if residual.shape != x.shape:
        raise ValueError(
            f"residual is added position by position and must have the shape of x, {x.shape}; got {residual.shape}. "
            "Project it first (a 1x1 convolution, say), or broadcast it."
        )
    return residual


def finish(y: jax.Array, residual: jax.Array | None, activation: Activation) -> jax.Array:
    """act(y + residual), as the separate operations: with their promotion."""
    y = y if residual is None else y + residual
    return y if activation is None else activation(y)


class Ending(NamedTuple):
    """What a module ends with: in the core, or after a scale or bias that differs from example to example."""

    affine: Affine
    activation: Activation
    residual: jax.Array | None

    @property
    def core(self) -> dict[str, Any]:
        """The arguments of `batch_norm` and `normalize`."""
        last = dict(activation=self.activation, residual=self.residual) if self.affine.per_channel else {}
        return self.affine.core | last

    def finish(self, y: jax.Array) -> jax.Array:
        if self.affine.per_channel:
            return y
        return finish(self.affine.finish(y), as_residual(self.residual, y), self.activation)


@jax.custom_jvp
def in_place_of(y: jax.Array, again: jax.Array) -> jax.Array:
    """The value of `again`, which is y computed anew, with the derivative of y: so that nobody has to keep y."""
    return again


@in_place_of.defjvp
def _in_place_of_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    return primals[1], tangents[0]  # of second derivatives too: `again` depends on the same arrays as y
