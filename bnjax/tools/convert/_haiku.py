"""Haiku parameters and state to variables and back: names, layouts, and the counter of its moving averages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bnjax.tools.convert._correspondence import Array, Dialect, check_distinct, leaves_of, tree_of
from bnjax.tools.convert._fill import filled
from bnjax.tools.convert._haiku_state import (
    Nested,
    averages,
    check_decay,
    ema,
    flat,
    to_flax_axes,
    to_haiku_axes,
    variances,
)
from bnjax.tools.convert._kernels import kernels_of
from bnjax.tools.convert._layers import layers_of, order_of
from bnjax.tools.convert._propose import advice, propose

if TYPE_CHECKING:
    import chex

HAIKU = Dialect(
    library="Haiku",
    separator="/",
    norm={
        "scale": "scale",
        "bias": "offset",
        "mean": "~/mean_ema/average",
        "var": "~/var_ema/average",
        "steps": "~/mean_ema/counter",
    },
    weight={"kernel": "w", "embedding": "embeddings", "bias": "b"},
)
_STATE = ("mean", "var", "steps")


def from_haiku(
    params: Nested,
    state: Nested,
    variables: chex.ArrayTree,
    *,
    names: Mapping[str, str] | None = None,
    transposed: Sequence[str] | None = None,
    apply_fn: Callable[..., Any] | None = None,
    x: Any = None,
) -> Any:
    r"""Returns variables with the values of a Haiku network.

    .. math:: \mathrm{scale}, \mathrm{bias}, \mathrm{mean}, \mathrm{var}, \mathrm{steps} =
              \mathtt{scale}, \mathtt{offset}, \mathtt{mean\_ema/average}, \mathtt{var\_ema/average}, \mathtt{counter}

    Haiku's averages leave out the zeros that they started from: they are those of `debias=True`, for whose `steps` the
    counter is taken, and training goes on as in Haiku. Into variables that count no steps go the averages alone, and
    the counter is lost: the next update gives them the weight :math:`d` instead of
    :math:`d (1 - d^t) / (1 - d^{t+1})`, the same once :math:`d^t` is small. `hidden` is :math:`(1 - d^t)` times the
    average, nothing of its own. A variance that Haiku's E[x²] − mean² rounded below zero, as in a constant channel,
    becomes 0. See :func:`fields_from_haiku` for decay_rate and eps, which no state holds.

    Args:
      params: `{"net/conv2_d": {"w": ..., "b": ...}, ...}`, of the shapes that Haiku gives them (`[1, 1, 1, C]` for the
        scale of images).
      state: `{"net/batch_norm/~/mean_ema": {"average": ..., "hidden": ..., "counter": ...}, ...}`.
      variables: what to fill: linen variables, an nnx state or an nnx module, of the same network.
      names: which module of `variables` has which name in Haiku: `{"BatchNorm_0": "net/~/batch_norm"}`. By default the
        path.
      transposed: paths of all transposed convolutions (`()` for none), where the modules are not known: their kernels
        have their channels the other way round. How they are known else stands in :func:`from_torch`; one with
        `transpose_kernel=True` is only known by its module, or by the name that linen gives it (`ConvTranspose_0`).
      apply_fn: as in :func:`from_torch`.
      x: as in :func:`from_torch`.

    Returns:
      `variables` with all its leaves from `params` and `state`, in their own dtypes.

    Raises:
      ValueError: names or shapes that do not correspond, in either direction: nothing is left out in silence;
        two modules of one name; a kernel that may or may not be transposed; a running variance that is negative or not
        finite.

    Examples:
      >>> import jax.numpy as jnp, numpy as np
      >>> from bnjax import tools
      >>> variables = {"batch_stats": {"bn": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}}
      >>> ema = {"average": np.full((1, 2), 3.0), "hidden": np.full((1, 2), 0.3), "counter": np.array(1)}
      >>> state = {"net/batch_norm/~/mean_ema": ema, "net/batch_norm/~/var_ema": ema}
      >>> tools.from_haiku({}, state, variables, names={"bn": "net/batch_norm"})["batch_stats"]["bn"]["mean"]
      Array([3., 3.], dtype=float32)
    """
    tree = tree_of(variables)
    leaves = check_distinct(leaves_of(variables, tree, HAIKU, names))
    layers = layers_of(variables, apply_fn, x)
    kernels = kernels_of(leaves, layers, transposed)
    values = flat(params) | averages(state, {leaf.key for leaf in leaves if leaf.role == "steps"}) | variances(state)
    return filled(
        tree,
        leaves,
        values,
        lambda value, leaf: to_flax_axes(np.asarray(value), leaf, kernels),
        layers,
        advice=lambda: advice(propose(values, leaves, HAIKU, order_of(variables, layers)), HAIKU),
    )


def to_haiku(
    variables: chex.ArrayTree,
    params: Nested,
    state: Nested,
    *,
    decay_rate: float | None = None,
    names: Mapping[str, str] | None = None,
    transposed: Sequence[str] | None = None,
    apply_fn: Callable[..., Any] | None = None,
    x: Any = None,
) -> tuple[dict[str, dict[str, Array]], dict[str, dict[str, Array]]]:
    r"""Returns the values of variables in the trees of a Haiku network: the inverse of :func:`from_haiku`.

    .. math:: \mathtt{hidden} = (1 - d^t) \cdot \mathtt{average}, \qquad t = \mathtt{counter}

    Where steps are counted they are the counter, the highest one where channels differ (those that skipped a batch then
    weigh a little more than before). Where none are, the averages have nothing to be debiased of: the counter is
    :math:`2^{30}`, with which Haiku goes on averaging by the decay rate alone, as the variables do.

    Args:
      variables: linen variables, an nnx state or an nnx module, of any shapes.
      params: the parameters of the Haiku network: arrays, or their shapes (`jax.eval_shape` of its `init`).
      state: its state, likewise.
      decay_rate: d, that of the network, in [0, 1); needed where steps are counted.
      names: as in :func:`from_haiku`.
      transposed: as in :func:`from_haiku`.
      apply_fn: as in :func:`from_torch`.
      x: as in :func:`from_torch`.

    Returns:
      `(params, state)` with NumPy arrays in the shapes and dtypes of those given; `network.apply` takes them.

    Raises:
      ValueError: nothing in the tree, names or shapes that do not correspond, a kernel that may or may not be
        transposed, or steps without a decay_rate.

    Examples:
      >>> import jax.numpy as jnp, numpy as np
      >>> from bnjax import tools
      >>> variables = {"batch_stats": {"bn": {"mean": jnp.ones(1), "var": jnp.ones(1), "steps": jnp.ones(1)}}}
      >>> ema = {"average": np.zeros((1, 1)), "hidden": np.zeros((1, 1)), "counter": np.array(0)}
      >>> state = {"bn/~/mean_ema": ema, "bn/~/var_ema": ema}
      >>> _, state = tools.to_haiku(variables, {}, state, decay_rate=0.75)
      >>> state["bn/~/mean_ema"]
      {'average': array([[1.]]), 'hidden': array([[0.25]]), 'counter': array(1)}
    """
    tree = tree_of(variables)
    leaves = check_distinct(leaves_of(variables, tree, HAIKU, names))
    layers = layers_of(variables, apply_fn, x)
    kernels = kernels_of(leaves, layers, transposed)
    like = flat(params) | averages(state, {leaf.key for leaf in leaves if leaf.role == "steps"})
    if like.keys() != (ours := {leaf.key for leaf in leaves}):
        found = propose(like, leaves, HAIKU, order_of(variables, layers))
        raise ValueError(
            f"the Haiku network and the variables do not correspond: it lacks {sorted(ours - like.keys())} and has "
            f"{sorted(like.keys() - ours)} besides. {advice(found, HAIKU)}"
        )
    values = {
        leaf.key: to_haiku_axes(np.asarray(tree.leaves[leaf.at]), leaf, like[leaf.key], kernels) for leaf in leaves
    }
    filled_params = {module: {k: values[f"{module}/{k}"] for k in held} for module, held in params.items()}
    return filled_params, {module: ema(module, held, values, decay_rate) for module, held in state.items()}


def fields_from_haiku(decay_rate: float, eps: float = 1e-5) -> dict[str, Any]:
    r"""Returns the fields of `bnjax.BatchNorm` for the arguments of `haiku.BatchNorm`.

    .. math:: \mathrm{momentum} = \mathtt{decay\_rate}, \quad \epsilon = \mathtt{eps}

    Args:
      decay_rate: Haiku's: the weight of the OLD value. It has no default there.
      eps: Haiku's epsilon.

    Returns:
      `momentum`, `epsilon` and `debias`.

    Raises:
      ValueError: decay_rate outside [0, 1).

    Examples:
      >>> from bnjax import tools
      >>> tools.fields_from_haiku(0.9)
      {'momentum': 0.9, 'epsilon': 1e-05, 'debias': True}
    """
    check_decay(decay_rate)
    return dict(momentum=decay_rate, epsilon=eps, debias=True)
