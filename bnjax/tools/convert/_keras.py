"""Keras weights to variables and back: names, layouts, and what the words mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bnjax.tools.convert._correspondence import (
    Array,
    Dialect,
    below,
    check_distinct,
    copied,
    leaves_of,
    tree_of,
    with_end,
)
from bnjax.tools.convert._fill import filled, with_steps
from bnjax.tools.convert._keras_layout import multipliers_of, to_flax_axes, to_keras_axes
from bnjax.tools.convert._keras_state import (
    array_of,
    convolutions_of,
    keyed,
    separable,
    transposed_of,
    weights_of,
    without_renorm,
)
from bnjax.tools.convert._kernels import kernels_of
from bnjax.tools.convert._layers import layers_of, order_of
from bnjax.tools.convert._propose import advice, propose

if TYPE_CHECKING:
    import chex

KERAS = Dialect(
    library="Keras",
    separator="/",
    norm={"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance", "steps": "steps"},
    weight={"kernel": "kernel", "embedding": "embeddings", "bias": "bias", "negative_slope": "alpha"},
)


def from_keras(
    state: Any,
    variables: chex.ArrayTree,
    *,
    names: Mapping[str, str] | None = None,
    prefix: str = "",
    transposed: Sequence[str] | None = None,
    partial: Sequence[str] | None = None,
    steps: float | None = None,
    apply_fn: Callable[..., Any] | None = None,
    x: Any = None,
) -> Any:
    r"""Returns variables with the values of a Keras model.

    .. math:: \mathrm{scale}, \mathrm{bias}, \mathrm{mean}, \mathrm{var} =
              \mathtt{gamma}, \mathtt{beta}, \mathtt{moving\_mean}, \mathtt{moving\_variance}

    Kernels have one layout in both, but for depthwise ones (`[h, w, in, multiplier]` becomes `[h, w, 1, out]`) and
    those of transposed convolutions, which are mirrored; how these are told from others stands in :func:`from_torch`.
    A `SeparableConv` is two modules in Flax, a depthwise convolution and one of size 1, that have one name in `names`.
    momentum means the same in both. Keras' defaults are `epsilon=1e-3, momentum=0.99`: write them into the layers.

    Args:
      state: the Keras model itself; or arrays of any shapes by name: `{w.path: w.numpy() for w in model.weights}`, or
        :func:`read_arrays` of a `.keras` or `.h5` file.
      variables: what to fill: linen variables, an nnx state or an nnx module, of the same network; `jax.eval_shape` of
        an `init` is enough.
      names: which module of `variables` has which name in `state`: `{"BatchNorm_0": "batch_normalization"}`; modules
        below it follow. By default the path. An error proposes a map, and :func:`propose_names` returns it.
      prefix: what the wanted names in `state` begin with, such as `"sequential/"`; others are left out.
      transposed: paths of all transposed convolutions (`()` for none), where the modules are not known; those with
        `transpose_kernel=True` count as convolutions, as Flax then keeps their kernels as the others do.
      partial: as in :func:`from_torch`.
      steps: how many batches the averages are worth, for layers that count them, as `BatchRenorm` does; Keras counts
        none.
      apply_fn: as in :func:`from_torch`.
      x: as in :func:`from_torch`.

    Returns:
      `variables` with all its leaves from `state`, in their own dtypes. Statistics, scales and biases may have axes of
      size one besides. The averages that `renorm=True` trains by (`renorm_mean`, `renorm_stddev`, `moving_stddev`) are
      left out: :class:`bnjax.linen.BatchRenorm` trains by mean and var. With `partial` it is a :class:`Loaded`.

    Raises:
      ValueError: as :func:`from_torch`.

    Examples:
      >>> import numpy as np, jax.numpy as jnp
      >>> from bnjax import tools
      >>> variables = {"batch_stats": {"bn": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}}
      >>> state = {"batch_normalization/moving_mean": np.ones(2), "batch_normalization/moving_variance": np.ones(2)}
      >>> tools.from_keras(state, variables, names={"bn": "batch_normalization"})["batch_stats"]["bn"]["mean"]
      Array([1., 1.], dtype=float32)
    """
    tree, prefix = tree_of(variables), with_end(prefix, KERAS)
    weights = below(weights_of(state), prefix)
    named = leaves_of(variables, tree, KERAS, names)
    weights = without_renorm(weights, named)
    leaves = check_distinct(keyed(named, weights))
    layers = layers_of(variables, apply_fn, x)
    there = {prefix + leaf.key.rpartition("/")[0]: leaf.module for leaf in leaves}
    elsewhere = {there[name]: known for name, known in transposed_of(state).items() if name in there}
    elsewhere |= convolutions_of(leaves)
    kernels = kernels_of(leaves, layers, transposed, elsewhere)
    weights = with_steps(weights, leaves, steps)

    def proposed() -> str:
        return advice(propose(weights, leaves, KERAS, order_of(variables, layers)), KERAS)

    return filled(
        tree,
        leaves,
        weights,
        lambda value, leaf: to_flax_axes(array_of(leaf.key, value), leaf, kernels),
        layers,
        advice=proposed,
        partial=partial,
    )


def to_keras(
    variables: chex.ArrayTree,
    *,
    names: Mapping[str, str] | None = None,
    prefix: str = "",
    transposed: Sequence[str] | None = None,
    depthwise: Mapping[str, int] | None = None,
    apply_fn: Callable[..., Any] | None = None,
    x: Any = None,
) -> dict[str, Array]:
    r"""Returns the values of variables by the names of Keras: the inverse of :func:`from_keras`.

    .. math:: \mathtt{gamma}, \mathtt{beta}, \mathtt{moving\_mean}, \mathtt{moving\_variance} =
              \mathrm{scale}, \mathrm{bias}, \mathrm{mean}, \mathrm{var}

    Args:
      variables: linen variables, an nnx state or an nnx module, of any shapes, with batch normalization or folded.
      names: as in :func:`from_keras`.
      prefix: what the names shall begin with.
      transposed: as in :func:`from_keras`.
      depthwise: the multiplier of the convolutions that are a `DepthwiseConv` in Keras, by path; also of those in a
        `SeparableConv`, where it is 1 by default.
      apply_fn: as in :func:`from_torch`.
      x: as in :func:`from_torch`.

    Returns:
      NumPy arrays by name, each a copy of its own; `for w in model.weights: w.assign(state[w.path])` takes them.
      Dtypes that NumPy does not have by itself, such as bfloat16, become float32. Counts of batches stay here.

    Raises:
      ValueError: as :func:`to_torch`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from bnjax import tools
      >>> sorted(tools.to_keras({"batch_stats": {"bn": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}}))
      ['bn/moving_mean', 'bn/moving_variance']
    """
    tree = tree_of(variables)
    leaves = [leaf for leaf in leaves_of(variables, tree, KERAS, names, prefix) if leaf.role != "steps"]
    leaves = check_distinct(separable(leaves))
    kernels = kernels_of(leaves, layers_of(variables, apply_fn, x), transposed)
    multipliers = multipliers_of(depthwise, leaves)
    return {
        leaf.key: copied(to_keras_axes(np.asarray(tree.leaves[leaf.at]), leaf, kernels, multipliers)) for leaf in leaves
    }
