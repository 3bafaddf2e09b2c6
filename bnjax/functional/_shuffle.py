"""Permutes rows across devices before an encoder and back after it (shuffling BN, for contrastive learning)."""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from bnjax.functional import _collectives

Tree = TypeVar("Tree")


def shuffle(rows: Tree, key: jax.Array, *, axis_name: _collectives.AxisName = None) -> Tree:
    r"""Permutes the rows of all devices together, so that a query and its key are normalised in different batches.

    .. math:: \mathrm{shuffle}(x)_i = x_{\pi(i)}

    with a uniformly random permutation π of the rows of the whole batch, drawn from `key`. In contrastive learning a
    network can recognise the positive pair by the statistics that both were normalised with. After a shuffle, layers
    that normalise per device (`axis_name=None` in the encoder) or per virtual batch
    (:class:`bnjax.linen.GhostBatchNorm`) do not reveal it: `keys = unshuffle(encoder(shuffle(x, key)), key)`.

    Args:
      rows: `[N, ...]`, an array or a tree of arrays (such as images and a mask) whose first axis holds the rows of this
        device; all arrays are permuted in the same way.
      key: a key of `jax.random`, the same on all devices and new in every step.
      axis_name: name, or names, of the mapped axes (`shard_map`, `pmap`, `vmap`) that the batch is spread over; takes
        one all-gather. None on one device, and under plain `jit`, where the rows of the whole array are permuted.

    Returns:
      The permuted rows, in the shapes of `rows`; differentiable.

    Raises:
      ValueError: the arrays differ in their number of rows, `axis_name` is not bound, or the key differs between
        devices (which is seen only in `shard_map` with `check_vma`).
      TypeError: `key` is not a key.

    Examples:
      >>> import jax, jax.numpy as jnp, bnjax
      >>> x, key = jnp.arange(6), jax.random.key(0)
      >>> shuffled = bnjax.shuffle(x, key)
      >>> bool((shuffled == x).all()), bnjax.unshuffle(shuffled, key).tolist()
      (False, [0, 1, 2, 3, 4, 5])

    References:
      He, Fan, Wu, Xie & Girshick 2020, https://arxiv.org/abs/1911.05722, section 3.3.
    """
    return _permuted(rows, key, axis_name, inverse=False)


def unshuffle(rows: Tree, key: jax.Array, *, axis_name: _collectives.AxisName = None) -> Tree:
    r"""Undoes :func:`shuffle` with the same key, exactly.

    .. math:: \mathrm{unshuffle}(x)_{\pi(i)} = x_i

    Args:
      rows: `[N, ...]`, an array or a tree of them, such as what an encoder computed from shuffled rows.
      key: the key that was given to `shuffle`.
      axis_name: the `axis_name` that was given to `shuffle`.

    Returns:
      The rows in the order that they had before `shuffle`.

    Raises:
      ValueError: as :func:`shuffle`.

    Examples:
      >>> import jax, jax.numpy as jnp, bnjax
      >>> both = lambda x: bnjax.unshuffle(bnjax.shuffle(x, jax.random.key(0), axis_name="i"), jax.random.key(0),
      ...                                  axis_name="i")
      >>> print(jax.vmap(both, axis_name="i")(jnp.arange(4).reshape(2, 2)).ravel())
      [0 1 2 3]

    References:
      He, Fan, Wu, Xie & Girshick 2020, https://arxiv.org/abs/1911.05722, section 3.3.
    """
    return _permuted(rows, key, axis_name, inverse=True)


def _permuted(rows: Tree, key: jax.Array, axis_name: _collectives.AxisName, inverse: bool) -> Tree:
    """Returns the rows of all devices in the order drawn from `key`, or with `inverse` in the order from before."""
    shapes = [jnp.shape(a) for a in jax.tree.leaves(rows)]
    if not shapes or len({shape[:1] for shape in shapes}) != 1 or not shapes[0]:
        raise ValueError(f"rows must be arrays of one number of rows, their first axis; got shapes {shapes}.")
    if not isinstance(key, jax.Array) and getattr(key, "dtype", None) != jnp.uint32:
        raise TypeError(f"key must be one key of jax.random, such as jax.random.key(0); got {type(key).__name__}.")
    if _collectives.varying(key):
        raise ValueError(
            f"key differs over the mesh axes {sorted(_collectives.varying(key))}, so that devices would disagree about "
            "the permutation: pass one key to all (in_specs=P()), and fold no axis_index into it."
        )
    names = _collectives.group_of(axis_name, None, shapes[0]).names
    here = shapes[0][0]
    order = jax.random.permutation(key, here * _collectives.group_size(_collectives.Group(names)))
    if inverse:
        order = jnp.argsort(order)
    if names:
        order = lax.dynamic_slice_in_dim(order, lax.axis_index(names) * here, here)

    def permuted(a: jax.Array) -> jax.Array:
        whole = lax.all_gather(a, names, tiled=True) if names else jnp.asarray(a)
        return jnp.take(whole, order, axis=0, unique_indices=True)

    return jax.tree.map(permuted, rows)
