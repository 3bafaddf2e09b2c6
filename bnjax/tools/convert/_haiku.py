"""Haiku parameters and state to variables and back: names, layouts, and the counter of its moving averages."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from bnjax.tools.convert._correspondence import Array, Dialect, Leaf, check_distinct, leaves_of, tree_of
from bnjax.tools.convert._fill import filled, reshaped
from bnjax.tools.convert._kernels import Kernels, kernels_of
from bnjax.tools.convert._layers import layers_of
from bnjax.tools.convert._propose import advice, propose

Nested = Mapping[str, Mapping[str, Any]]

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
_AVERAGES = ("mean_ema", "var_ema")
# 1 − dⁿ is 1 in float32 for every d < 1 that float32 can tell from 1; and 2³⁰ steps more still fit the int32.
_DEBIASED = 2**30


def from_haiku(
    params: Nested,
    state: Nested,
    variables: Any,
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
    values = _flat(params) | _averages(state, {leaf.key for leaf in leaves if leaf.role == "steps"}) | _variances(state)
    return filled(
        tree,
        leaves,
        values,
        lambda value, leaf: _to_flax(np.asarray(value), leaf, kernels),
        advice=lambda: advice(propose(values, leaves, HAIKU, layers), HAIKU),
    )


def to_haiku(
    variables: Any,
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
    like = _flat(params) | _averages(state, {leaf.key for leaf in leaves if leaf.role == "steps"})
    if like.keys() != (ours := {leaf.key for leaf in leaves}):
        raise ValueError(
            f"the Haiku network and the variables do not correspond: it lacks {sorted(ours - like.keys())} and has "
            f"{sorted(like.keys() - ours)} besides. {advice(propose(like, leaves, HAIKU, layers), HAIKU)}"
        )
    values = {leaf.key: _to_haiku(np.asarray(tree.leaves[leaf.at]), leaf, like[leaf.key], kernels) for leaf in leaves}
    filled_params = {module: {k: values[f"{module}/{k}"] for k in held} for module, held in params.items()}
    return filled_params, {module: _ema(module, held, values, decay_rate) for module, held in state.items()}


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
    _check_decay(decay_rate)
    return dict(momentum=decay_rate, epsilon=eps, debias=True)


def _check_decay(decay_rate: float | None) -> None:
    if decay_rate is None or not 0 <= decay_rate < 1:
        raise ValueError(f"Haiku's decay_rate is the weight of the OLD value and must be in [0, 1); got {decay_rate}.")


def _flat(nested: Nested) -> dict[str, Any]:
    return {f"{module}/{name}": value for module, held in nested.items() for name, value in held.items()}


def _averages(state: Nested, counters: set[str]) -> dict[str, Any]:
    """Returns the state by key without what the averages make redundant: `hidden`, counters nobody asks for."""
    derived = {f"{m}/{name}" for m in state if m.endswith(_AVERAGES) for name in ("hidden", "counter")}
    return {key: value for key, value in _flat(state).items() if key in counters or key not in derived}


def _variances(state: Nested) -> dict[str, Array]:
    """Returns the variances, with those that rounding made negative as 0; those further below are refused later."""
    values = {}
    for module, held in state.items():
        norm, _, name = module.rpartition("/")
        beside = state.get(f"{norm}/mean_ema", {})
        if name == "var_ema" and "average" in held and "average" in beside:
            var, mean = np.asarray(held["average"]), np.asarray(beside["average"])
            rounding = 100 * float(jnp.finfo(var.dtype).eps) * mean**2
            values[f"{module}/average"] = np.where((var < 0) & (var >= -rounding), 0, var).astype(var.dtype)
    return values


def _to_flax(value: Array, leaf: Leaf, kernels: Kernels) -> Array:
    if leaf.role == "steps":
        return np.broadcast_to(value, leaf.shape)
    if leaf.role != "kernel" or value.ndim < 3:
        return value
    return kernels.chosen(leaf, _plain(value, leaf, kernels), _turned(value, leaf, kernels), leaf.shape)


def _plain(value: Array, leaf: Leaf, kernels: Kernels) -> Array:
    """Returns a kernel whose axes are in the same order in both: a transposed one is then of `transpose_kernel`."""
    return _flipped(value) if kernels.is_named_transposed(leaf.module) else value


def _turned(value: Array, leaf: Leaf, kernels: Kernels) -> Array:
    """Returns a kernel, read as that of a transposed convolution: Haiku stores [..., out, in], not mirrored."""
    return _flipped(value) if kernels.stores_transposed(leaf.module) else value.swapaxes(-1, -2)


def _flipped(value: Array) -> Array:
    return np.flip(value, tuple(range(value.ndim - 2)))


def _to_haiku(value: Array, leaf: Leaf, like: Any, kernels: Kernels) -> Array:
    if leaf.role == "steps":
        return np.asarray(value.max(initial=0), like.dtype)
    if leaf.role == "kernel" and value.ndim > 2:
        value = kernels.chosen(leaf, _plain(value, leaf, kernels), _turned(value, leaf, kernels), tuple(like.shape))
    value = reshaped(value, like.shape)
    if value.shape != like.shape:
        raise ValueError(f"{leaf.module}/{leaf.role} has shape {leaf.shape}; {leaf.key} has {like.shape} in Haiku.")
    return value.astype(like.dtype)


def _ema(
    module: str, held: Mapping[str, Any], values: Mapping[str, Array], decay_rate: float | None
) -> dict[str, Array]:
    """Returns one module of Haiku's state; that of an average is made of the average and its steps."""
    if not module.endswith(_AVERAGES):
        return {name: values[f"{module}/{name}"] for name in held}
    norm, _, _ = module.rpartition("/")
    average, steps = values[f"{module}/average"], values.get(f"{norm}/mean_ema/counter")
    if steps is None:
        return {"average": average, "hidden": average, "counter": np.asarray(_DEBIASED, held["counter"].dtype)}
    _check_decay(decay_rate)
    share = 1 - float(np.asarray(decay_rate, average.dtype)) ** int(steps)  # 1 − dᵗ for the d that Haiku computes with
    return {"average": average, "hidden": (share * average).astype(average.dtype), "counter": steps}
