"""bnjax's batch normalization in an nnx model that was written with Flax's, and back."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import bnjax.linen
import bnjax.nnx
from bnjax.tools._described import is_flax
from bnjax.tools._trees import show

# What bnjax's modules can be told beyond, or in place of, what Flax's were: it changes no parameter and no statistic.
_FIELDS = (
    "axis_name",
    "axis_index_groups",
    "stats_axis_name",
    "momentum",
    "epsilon",
    "dtype",
    "use_running_average",
    "debias",
    "unbiased_var",
    "count_skipped",
)
# Fields that Flax's modules have too.
_FLAX_FIELDS = (
    "use_running_average",
    "axis",
    "momentum",
    "epsilon",
    "dtype",
    "param_dtype",
    "use_bias",
    "use_scale",
    "axis_name",
    "axis_index_groups",
    "use_fast_variance",
)


def swap(model: nnx.Module, **fields: Any) -> nnx.Module:
    r"""Returns an nnx model with `bnjax.nnx.BatchNorm` in the place of every `flax.nnx.BatchNorm`.

    .. math:: y = \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}} \cdot \mathrm{scale} + \mathrm{bias}

    All variables keep their values, places and sharing, so that evaluation is the same and checkpoints of either fit.
    For linen, whose modules are made inside of source code, see :func:`swapped_norms`.

    Args:
      model: an nnx module; it stays as it is. Make optimizers of the result.
      fields: fields for all the layers, such as `axis_name="data"`: axis_name, axis_index_groups, stats_axis_name,
        momentum, epsilon, dtype, use_running_average, debias, unbiased_var, count_skipped. The others stay as the model
        has them.

    Returns:
      A new module.

    Raises:
      ValueError: no `flax.nnx.BatchNorm` in the model, another field, or a subclass of it with a `__call__` of its own.
      TypeError: `model` is not an nnx module.

    Examples:
      >>> import jax.numpy as jnp, bnjax
      >>> from bnjax import tools
      >>> from flax import nnx
      >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
      >>> swapped = tools.swap(model, axis_name="data")
      >>> type(swapped.layers[1]) is bnjax.nnx.BatchNorm, swapped.layers[1].axis_name
      (True, 'data')
    """
    check_fields(fields)
    return _exchanged(model, is_flax, _to_bnjax, fields, "flax.nnx.BatchNorm")


def swap_back(model: nnx.Module, **fields: Any) -> nnx.Module:
    r"""Returns an nnx model with `flax.nnx.BatchNorm` in the place of every `bnjax.nnx.BatchNorm`: undoes :func:`swap`.

    .. math:: \mathrm{scale}_\text{Flax} = \mathrm{scale} + \mathrm{scale\_offset}

    Evaluation stays the same. Training is Flax's: what its layer does not have (`debias`, `unbiased_var`,
    `stats_axis_name`, `update_stats`, the counters) is left out.

    Args:
      model: an nnx module; it stays as it is.
      fields: fields of Flax's layers to set in all of them: use_running_average, momentum, epsilon, dtype, axis_name,
        axis_index_groups.

    Returns:
      A new module.

    Raises:
      ValueError: no `bnjax.nnx.BatchNorm` in the model, another field, a `momentum` that is no number (give one), or
        several feature axes.
      TypeError: `model` is not an nnx module.

    Examples:
      >>> import bnjax
      >>> from bnjax import tools
      >>> from flax import nnx
      >>> norm = bnjax.nnx.BatchNorm(4, momentum=None, rngs=nnx.Rngs(0))
      >>> type(tools.swap_back(norm, momentum=0.9)) is nnx.BatchNorm
      True
    """
    check_fields(fields, set(_FIELDS) & set(_FLAX_FIELDS))
    return _exchanged(model, lambda m: type(m) is bnjax.nnx.BatchNorm, _to_flax, fields, "bnjax.nnx.BatchNorm")


def check_fields(fields: dict[str, Any], allowed: Any = _FIELDS) -> None:
    if unknown := sorted(set(fields) - set(allowed)):
        raise ValueError(f"fields must be some of {sorted(allowed)}, which change no variable; got {unknown}.")


def _exchanged(model: nnx.Module, wanted: Any, exchange: Any, fields: dict[str, Any], name: str) -> nnx.Module:
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model must be an nnx module; got {type(model).__name__}. For linen run it in tools.swapped_norms()."
        )
    model = nnx.clone(model)
    layers = [(tuple(map(str, path)), module) for path, module in nnx.iter_modules(model)]
    own = [show(path) for path, m in layers if isinstance(m, nnx.BatchNorm) and not is_flax(m)]
    if own:
        raise ValueError(
            f"{own} are of subclasses of flax.nnx.BatchNorm with a __call__ of their own, which nothing can stand for: "
            "derive them from bnjax.nnx.BatchNorm instead."
        )
    new = {id(module): exchange(path, module, fields) for path, module in layers if wanted(module)}
    if not new:
        raise ValueError(f"the model holds no {name}.")
    for _, node in list(nnx.iter_graph(model)):
        if isinstance(node, nnx.Pytree):
            for attribute, value in vars(node).items():  # directly, since an assignment asks what is a variable anew
                vars(node)[attribute] = jax.tree.map(lambda v: new.get(id(v), v), value, is_leaf=_is_node)
    return new.get(id(model), model)


def _is_node(value: Any) -> bool:
    return isinstance(value, (nnx.Pytree, nnx.Variable))


def _to_bnjax(path: Any, module: Any, fields: dict[str, Any]) -> nnx.Module:
    """Returns a layer of bnjax with the variables of one of Flax."""
    kept = {name: getattr(module, name) for name in (*_FLAX_FIELDS, "promote_dtype")}
    new = bnjax.nnx.BatchNorm(module.num_features, **{**kept, **fields}, rngs=nnx.Rngs(0))
    for name in ("mean", "var", "scale", "bias"):
        setattr(new, name, nnx.data(getattr(module, name)))
    for name in ("steps", "skipped"):  # like the mean: with axes in front, and metadata, where modules are stacked
        if hasattr(new, name):
            setattr(new, name, module.mean.replace(jnp.zeros(module.mean.shape, jnp.float32)))
    return new


def _to_flax(path: Any, module: Any, fields: dict[str, Any]) -> nnx.Module:
    """Returns a layer of Flax with the variables of one of bnjax."""
    kept = {name: getattr(module, name) for name in (*_FLAX_FIELDS, "promote_dtype")} | fields
    if kept["momentum"] is None or callable(kept["momentum"]):
        raise ValueError(
            f"{show(path)}: momentum must be a number in Flax; it is {kept['momentum']}. Pass momentum=..."
        )
    if not isinstance(module.num_features, int):
        raise ValueError(f"{show(path)} has the features {module.num_features}: Flax's layer has one number of them.")
    new = nnx.BatchNorm(module.num_features, **kept, rngs=nnx.Rngs(0))
    for name in ("mean", "var", "scale", "bias"):
        setattr(new, name, nnx.data(getattr(module, name)))
    if new.scale is not None and module.scale_offset:
        new.scale[...] += module.scale_offset
    return new
