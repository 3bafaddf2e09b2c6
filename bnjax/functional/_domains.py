"""Variables of several domains, one row for each: the row that a call is about, read and written."""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from bnjax.functional._axes import as_array

Tree = TypeVar("Tree")
Domain = jax.Array | int


def at_domain(stored: Tree, domain: Domain) -> Tree:
    """Row `domain` of each array [D, ...] of the tree; NaN where a traced domain is none of 0 to D − 1."""

    def row(rows: jax.Array) -> jax.Array:
        index = _index(domain, len(rows))
        return jnp.asarray(rows).at[index].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)

    return jax.tree.map(row, stored)


def set_domain(stored: Tree, domain: Domain, new: Tree) -> Tree:
    """The arrays [D, ...] of the tree with `new` in row `domain`; as they were for a traced domain that is none."""

    def with_row(rows: jax.Array, row: jax.Array) -> jax.Array:
        return jnp.asarray(rows).at[_index(domain, len(rows))].set(row, mode="drop", wrap_negative_indices=False)

    return jax.tree.map(with_row, stored, new)


def _index(domain: Domain, number: int) -> jax.Array:
    index = as_array("domain", domain)
    if index.ndim or not jnp.issubdtype(index.dtype, jnp.integer):
        raise ValueError(
            "domain must be one integer for the whole batch, from 0 on, a traced one too; "
            f"got {index.dtype} of shape {index.shape}. Call the layer once for each domain's rows."
        )
    if not isinstance(domain, jax.core.Tracer) and not 0 <= int(np.asarray(domain)) < number:
        raise ValueError(f"domain must be one of the {number} domains 0 to {number - 1}; got {domain}.")
    return index.astype(jnp.int32)


class Domains(NamedTuple):
    """What a module knows of it: whether its variables have rows at all, and of which one this call is."""

    number: int | None = None  # None: no rows, the variables are of the feature shape
    here: Domain = 0
    shared_affine: bool = False

    @property
    def of_affine(self) -> "Domains":
        """The same for scale and bias."""
        return ONE if self.shared_affine else self

    def shape(self, row: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a variable."""
        return row if self.number is None else (self.number, *row)

    def take(self, stored: Tree) -> Tree:
        """The row of this call."""
        return stored if self.number is None else at_domain(stored, self.here)

    def put(self, stored: Tree, new: Tree) -> Tree:
        """The variables after this call."""
        return new if self.number is None else set_domain(stored, self.here, new)


ONE = Domains()  # of a layer that does not tell domains apart
