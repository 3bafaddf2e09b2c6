"""Implements split batch normalization: separate statistics for each domain, such as clean and adversarial images."""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from bnjax.functional import _axes, _collectives
from bnjax.functional._batch_norm import batch_norm
from bnjax.functional._moments import Moments
from bnjax.functional._normalize import normalize
from bnjax.functional._running import RunningStats, update_running

Tree = TypeVar("Tree")
Domain = jax.Array | int


def split_batch_norm(
    x: jax.Array,
    domain: Domain,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-5,
    mask: jax.Array | None = None,
    axis_name: _collectives.AxisName = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> tuple[jax.Array, Moments]:
    r"""Normalises a batch of one domain d by its own mean and variance, with the scale and bias of the domain.

    .. math::
        y = \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}} \cdot \mathrm{scale}_d + \mathrm{bias}_d

    The running averages have a row for each domain: :func:`bnjax.update_split_running` updates one row and
    :func:`bnjax.split_normalize` normalises by one.

    Args:
      x: `[..., C]`, the rows of one domain.
      domain: the domain of these rows, an integer from 0 to D − 1, which may be traced.
      scale: `[D, C]`, or `[C]` for all domains, or None for 1.
      bias: `[D, C]`, or `[C]` for all domains, or None for 0.
      axis, epsilon, mask, axis_name, axis_index_groups, dtype: see :func:`bnjax.batch_norm`.

    Returns:
      y, of the shape of x, and the `Moments` of the batch, each `[C]`. If a traced domain is outside 0 to D − 1,
      y is NaN where it depends on the domain (through scale or bias).

    Raises:
      ValueError: a known domain is outside 0 to D − 1; also as :func:`bnjax.batch_norm`.
      TypeError: as :func:`bnjax.batch_norm`.

    Examples:
      >>> import jax.numpy as jnp, bnjax
      >>> x, scale = jnp.array([[1.0], [3.0]]), jnp.array([[1.0], [10.0]])
      >>> print([jnp.round(bnjax.split_batch_norm(x, domain, scale)[0], 2).ravel().tolist() for domain in (0, 1)])
      [[-1.0, 1.0], [-10.0, 10.0]]

    References:
      Xie et al. 2020 (AdvProp), https://arxiv.org/abs/1911.09665, section 4; Chang et al. 2019 (DSBN),
      https://arxiv.org/abs/1906.03950.

    Differences: timm's `SplitBatchNorm2d` cuts one mixed batch into equal parts, in order, a part for each of its
    layers, and evaluates with the first. Here a call has one domain, so parts may have any size, and evaluation any
    domain.
    """
    shape = _axes.layout_of(jnp.asarray(x), axis).shape
    return batch_norm(
        x,
        _row(scale, domain, shape),
        _row(bias, domain, shape),
        axis=axis,
        epsilon=epsilon,
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        dtype=dtype,
    )


def split_normalize(
    x: jax.Array,
    domain: Domain,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    axis: int | Sequence[int] = -1,
    **options: Any,
) -> jax.Array:
    r"""Normalises x by the running averages of one domain d.

    .. math::
        y = \frac{x - \mathrm{mean}_d}{\sqrt{\mathrm{var}_d + \epsilon}} \cdot \mathrm{scale}_d + \mathrm{bias}_d

    Args:
      x: `[..., C]`.
      domain: the domain of these rows, an integer from 0 to D − 1, which may be traced.
      mean, var: `[D, C]`, the running averages.
      scale, bias: `[D, C]`, or `[C]` for all domains, or None.
      axis: the feature axis or axes.
      options: those of :func:`bnjax.normalize`.

    Returns:
      y, of the shape of x; NaN for a traced domain outside 0 to D − 1.

    Raises:
      ValueError, TypeError: as :func:`bnjax.split_batch_norm`.

    Examples:
      >>> import jax.numpy as jnp, bnjax
      >>> mean, var = jnp.array([[0.0], [1.0]]), jnp.ones((2, 1))
      >>> print(jnp.round(bnjax.split_normalize(jnp.array([[3.0]]), 1, mean, var), 3))
      [[2.]]

    References:
      Chang et al. 2019, https://arxiv.org/abs/1906.03950.
    """
    shape = _axes.layout_of(jnp.asarray(x), axis).shape
    mean, var = at_domain((jnp.asarray(mean), jnp.asarray(var)), domain)
    return normalize(x, mean, var, _row(scale, domain, shape), _row(bias, domain, shape), axis=axis, **options)


def update_split_running(running: RunningStats, moments: Moments, domain: Domain, **options: Any) -> RunningStats:
    r"""Takes one step of the running averages of domain d; those of the other domains stay as they are.

    .. math::
        \mathrm{mean}_d \leftarrow m \cdot \mathrm{mean}_d + (1 - m)\, \mathrm{mean}_\text{batch}, \qquad
        \mathrm{var}_d \leftarrow m \cdot \mathrm{var}_d + (1 - m)\, \mathrm{var}_\text{batch}

    Args:
      running: `RunningStats`, each `[D, C]`.
      moments: `Moments` of a batch of the domain, each `[C]`.
      domain: an integer from 0 to D − 1, which may be traced; if a traced one is outside, nothing changes.
      options: those of :func:`bnjax.update_running`, such as `momentum` for m.

    Returns:
      `RunningStats`, each `[D, C]`.

    Raises:
      ValueError: a known domain is outside 0 to D − 1; also as :func:`bnjax.update_running`.

    Examples:
      >>> import jax.numpy as jnp, bnjax
      >>> running = bnjax.RunningStats(mean=jnp.zeros((2, 1)), var=jnp.ones((2, 1)))
      >>> moments = bnjax.batch_moments(jnp.array([[1.0], [3.0]]))
      >>> print(bnjax.update_split_running(running, moments, 1, momentum=0.5).mean.ravel())
      [0. 1.]

    References:
      Chang et al. 2019, https://arxiv.org/abs/1906.03950.
    """
    return set_domain(running, domain, update_running(at_domain(running, domain), moments, **options))


def _row(v: jax.Array | None, domain: Domain, shape: tuple[int, ...]) -> jax.Array | None:
    """Returns the row of a vector `[D, C]` for the domain, or the vector itself if all domains share it."""
    if v is None or jnp.shape(v) == shape:
        return v
    if jnp.shape(v)[1:] != shape:
        raise ValueError(
            f"vectors must be of the feature shape {shape}, or a row of it per domain; got {jnp.shape(v)}."
        )
    return at_domain(jnp.asarray(v), domain)


def at_domain(stored: Tree, domain: Domain) -> Tree:
    """Returns row `domain` of each array [D, ...] of the tree; NaN for a traced domain outside 0 to D − 1."""

    def row(rows: jax.Array) -> jax.Array:
        """Returns row `domain` of one array."""
        index = _index(domain, len(rows))
        return jnp.asarray(rows).at[index].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)

    return jax.tree.map(row, stored)


def set_domain(stored: Tree, domain: Domain, new: Tree) -> Tree:
    """Returns the arrays [D, ...] of the tree with `new` in row `domain`; unchanged if a traced domain is outside."""

    def with_row(rows: jax.Array, row: jax.Array) -> jax.Array:
        """Returns one array with `row` in row `domain`."""
        return jnp.asarray(rows).at[_index(domain, len(rows))].set(row, mode="drop", wrap_negative_indices=False)

    return jax.tree.map(with_row, stored, new)


def _index(domain: Domain, number: int) -> jax.Array:
    """Returns the domain as an int32 scalar; raises ValueError unless it is one integer from 0 to number − 1."""
    index = _axes.as_array("domain", domain)
    if index.ndim or not jnp.issubdtype(index.dtype, jnp.integer):
        raise ValueError(
            "domain must be one integer for the whole batch, from 0 on, a traced one too; "
            f"got {index.dtype} of shape {index.shape}. Call the layer once for each domain's rows."
        )
    if not isinstance(domain, jax.core.Tracer) and not 0 <= int(np.asarray(domain)) < number:
        raise ValueError(f"domain must be one of the {number} domains 0 to {number - 1}; got {domain}.")
    return index.astype(jnp.int32)


def take_row(v: jax.Array | None, domain: Domain, shape: tuple[int, ...]) -> jax.Array | None:
    """Returns row `domain` of v if its shape is `shape`, `(D, C)`, and v itself if all domains share it."""
    return at_domain(v, domain) if v is not None and v.shape == shape else v
