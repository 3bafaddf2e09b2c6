"""Which parameters an optimizer decays, and which belong to batch normalization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bnjax.tools import _trees
from bnjax.tools._trees import Path, show

if TYPE_CHECKING:
    import chex

# The parameter names of flax.linen and flax.nnx, by role. Others have no known role: they are asked for.
_WEIGHTS = frozenset({"kernel", "embedding", "lora_a", "lora_b"})
_AFFINE = frozenset({"scale", "bias", "negative_slope"})


def decay_mask(
    params: chex.ArrayTree,
    *,
    batch_stats: Any = None,
    decay: Sequence[str] = (),
    no_decay: Sequence[str] = (),
) -> Any:
    r"""Returns True where weight decay applies: by path and role, never by rank.

    .. math:: \theta \leftarrow \theta - \eta\,(u + \lambda\,m \odot \theta), \qquad m = \text{decay\_mask}

    Kernels and embeddings are decayed. Scales and biases are not, of batch normalization or of any other layer: in
    front of a normalised layer decay acts as a learning rate, on a scale it moves the function itself. A vmapped scale
    of shape `[R, C]` stays a scale. A parameter of another name (`gamma`, `pos_embedding`) has no known role, and is an
    error rather than silently decayed.

    Args:
      params: parameters of any shapes: a linen `params` collection (nested, frozen, boxed, vmapped), all the variables,
        or an nnx state of `nnx.Param`.
      batch_stats: the statistics of the same model. Every parameter of a module that owns statistics is then not
        decayed, whatever its name.
      decay: patterns of parameters to decay, `"pos_embedding"` or `"encoder/*/gate"`: globs over names joined by `/`,
        which fit a parameter, or a module for all below it.
      no_decay: patterns of parameters not to decay. It outranks `decay`, and both outrank the names.

    Returns:
      A tree of bools for `optax.add_decayed_weights(..., mask=)`, `optax.adamw(..., mask=)` and `optax.masked`.

    Raises:
      ValueError: parameters of unknown role; a pattern that fits nothing; `batch_stats` of another model.

    Examples:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, optax, bnjax
      >>> from bnjax import tools
      >>> model = nn.Sequential([nn.Dense(3), bnjax.linen.BatchNorm(use_running_average=True)])
      >>> params = model.init(jax.random.key(0), jnp.ones((2, 4)))["params"]
      >>> tools.decay_mask(params)
      {'layers_0': {'bias': False, 'kernel': True}, 'layers_1': {'bias': False, 'scale': False}}
      >>> optimizer = optax.adamw(1e-3, weight_decay=0.05, mask=tools.decay_mask)

    References:
      van Laarhoven 2017, "L2 Regularization versus Batch and Weight Normalization", https://arxiv.org/abs/1706.05350.
    """
    names = _parameters(params)
    norms = set() if batch_stats is None else _norms(names, batch_stats)
    unknown: list[str] = []

    def decayed(path: Path) -> bool:
        if any(_trees.matches(path, p) for p in no_decay):
            return False
        if any(_trees.matches(path, p) for p in decay):
            return True
        # weight normalization joins the names of what it scales: 'Dense_0/kernel/scale'
        role = path[-1].rpartition("/")[-1] if path else ""
        if path[:-1] in norms or role in _AFFINE or path not in names:
            return False
        if role not in _WEIGHTS:
            unknown.append(show(path))
        return True

    _check_patterns(names, [*decay, *no_decay])
    mask = _trees.label_leaves(params, decayed)
    if unknown:
        raise ValueError(
            f"decay_mask does not know the role of the parameters {unknown}, so it cannot tell whether to decay them. "
            "Name them in decay=[...] (weights) or no_decay=[...] (scales, shifts, offsets), or pass batch_stats= if "
            "they belong to batch normalization layers."
        )
    return mask


def affine_labels(params: chex.ArrayTree, batch_stats: Any, *, affine: str = "affine", rest: str = "rest") -> Any:
    r"""Returns labels for `optax.multi_transform`: `affine` for scale and bias of batch normalization, else `rest`.

    Each parameter of a module that owns statistics is `affine`, whatever its name. The scale and bias of layer or group
    normalization are `rest`: no statistics belong to them.

    Args:
      params: parameters of any shapes: a linen `params` collection, or an nnx state of `nnx.Param`.
      batch_stats: the statistics of the same model: the linen collection, or an nnx state with `nnx.BatchStat`.
      affine: the label of the parameters of batch normalization.
      rest: the label of all others.

    Returns:
      A tree of strings, of the structure of `params`.

    Raises:
      ValueError: `batch_stats` holds no statistics, or those of another model.

    Examples:
      To train nothing but batch normalization (exchange the two transformations to freeze it instead):

      >>> import jax, jax.numpy as jnp, flax.linen as nn, optax, bnjax
      >>> from bnjax import tools
      >>> model = nn.Sequential([nn.Dense(3), bnjax.linen.BatchNorm(use_running_average=True)])
      >>> variables = model.init(jax.random.key(0), jnp.ones((2, 4)))
      >>> labels = tools.affine_labels(variables["params"], variables["batch_stats"])
      >>> labels
      {'layers_0': {'bias': 'rest', 'kernel': 'rest'}, 'layers_1': {'bias': 'affine', 'scale': 'affine'}}
      >>> optimizer = optax.multi_transform({"affine": optax.sgd(0.1), "rest": optax.set_to_zero()}, labels)

    References:
      Frankle, Schwab & Morcos 2021, "Training BatchNorm and Only BatchNorm", https://arxiv.org/abs/2003.00152.
    """
    norms = _norms(_parameters(params), batch_stats)
    return _trees.label_leaves(params, lambda path: affine if path[:-1] in norms else rest)


def _parameters(params: Any) -> set[Path]:
    """Returns the paths of all leaves but statistics (in `params` there are none; in all the variables there are)."""
    flat = _trees.flatten(params)
    if not flat.names:
        raise ValueError("params holds no parameters.")
    statistics = {i for at in flat.layers.values() for role, i in at.items() if role in _trees.STATISTICS}
    return {name for i, name in enumerate(flat.names) if i not in statistics}


def _norms(names: set[Path], batch_stats: Any) -> set[Path]:
    """Returns the modules that own statistics; raises ValueError where they are of another model."""
    layers = set(_trees.flatten_with_layers(batch_stats).layers)
    modules = {name[:i] for name in names for i in range(len(name))}
    owners = {name[:-1] for name in names}
    # A layer without scale and bias has no parameters of its own, but stands beside layers that do.
    strangers = sorted(show(layer) for layer in layers if layer not in owners and layer[:-1] not in modules)
    missed = not (layers & owners) and any(name[-1:] == ("scale",) for name in names)
    if strangers or missed:
        raise ValueError(
            f"batch_stats does not belong to params: of its layers {sorted(map(show, layers))}, "
            f"{strangers or 'all'} are at paths that params does not have. Pass both from one model, at one depth: "
            "variables['params'] with variables['batch_stats'], or nnx.state(model, nnx.Param) with "
            "nnx.state(model, nnx.BatchStat)."
        )
    return layers


def _check_patterns(names: set[Path], patterns: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(_trees.matches(name, pattern) for name in names):
            raise ValueError(f"the pattern {pattern!r} fits no parameter of {sorted(map(show, names))}.")
