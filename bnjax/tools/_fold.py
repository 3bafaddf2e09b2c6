"""Folding batch normalization into the layers around it, for inference."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from bnjax.tools import _trees
from bnjax.tools._fold_pairs import Match, Pair, find_pairs
from bnjax.tools._fold_rules import fold_pair, put_row, take_row
from bnjax.tools._fold_strip import strip, strip_module, stripped_apply
from bnjax.tools._layers import Program, program
from bnjax.tools._sound import check_variances
from bnjax.tools._trees import Path, Tree, show

Layers = dict[Path, dict[str, jax.Array]]  # the variables of each layer that takes part


class Folded(NamedTuple):
    r"""What :func:`fold` made of a model.

    Attributes:
      variables: of the structure that was given; folded normalizations do nothing, or add a shift.
      stripped: without the folded normalizations; the layers that took them have a bias.
      apply_fn: runs `stripped`: `apply_fn(stripped, x)`.
      pairs: what was folded into what, each a :class:`Pair`.
      left: the normalizations that were not folded, and why: `{"block1/norm": "...", ...}`.
      difference: :math:`\max|y' - y| / \max|y|` on the sample, y' from `stripped`.

    Examples:
      >>> import jax, jax.numpy as jnp, bnjax
      >>> from bnjax import tools
      >>> norm, x = bnjax.linen.BatchNorm(use_running_average=True), jnp.ones((2, 3))
      >>> tools.fold(norm.apply, norm.init(jax.random.key(0), x), x).pairs  # no layer beside it
      ()
    """

    variables: Any
    stripped: Any
    apply_fn: Callable[..., Any]
    pairs: tuple[Pair, ...]
    left: dict[str, str]
    difference: float


def fold(apply_fn: Callable[..., Any], variables: Any, x: Any, *, layers: Sequence[str] | None = None) -> Folded:
    r"""Moves batch normalization, as it is in evaluation, into the convolution or dense layer before or after it.

    .. math::
        a = \frac{\mathrm{scale}}{\sqrt{\mathrm{var} + \epsilon}}, \quad c = \mathrm{bias} - a\,\mathrm{mean}:
        \qquad a(W u + b) + c = (aW)\,u + (ab + c), \qquad W(ax + c) + b = (Wa)\,x + (Wc + b)

    Pairs are found in the flow of data of the traced model, never by names: a normalization is folded into the Conv,
    ConvTranspose or Dense (nnx: Linear; grouped and depthwise convolutions too) that makes its input, if nothing else
    uses that; or into the Conv or Dense that uses its output, if nothing else does and no zeros are padded in between.
    What cannot be folded is left in place, with the reason.

    All variants in `bnjax.linen` and `bnjax.nnx` evaluate by this formula and are folded: FrozenBatchNorm in either
    mode, PowerNorm and MovingAverageBatchNorm with the mean zero that they keep. A SplitBatchNorm is folded if its
    domain is a number: the result is the network of that domain, whichever the model is given afterwards. Subclasses of
    your own may do more, and are left.

    `stripped` runs without the folded normalizations: as `folded.apply_fn(folded.stripped, x)`, or, for linen, in your
    own definition of the network without them (its convolutions with `use_bias=True`), whose `params` it holds.
    `variables` fits the model as it is, for tools that want the old structure: the kernels are folded and each
    normalization is the identity up to rounding, plus the shift where the layer before it has no bias (a fold into a
    layer after it that has no bias is left out there). Under `jit` the compiler fuses what is left into its
    neighbours; folding pays most when the network is exported, or quantized.

    Args:
      apply_fn: the model in evaluation mode: for linen `apply_fn(variables, x)`, such as
        `functools.partial(model.apply, train=False)`; for an nnx module `apply_fn(module, x)`.
      variables: linen variables, or an nnx module.
      x: sample input, any pytree that `apply_fn` takes; the model is traced with it, and compared on it.
      layers: patterns of the normalizations to fold; all by default.

    Returns:
      `Folded(variables, stripped, apply_fn, pairs, left, difference)`.

    Raises:
      ValueError: no statistics in the tree, or a pattern that fits no layer; a variance that is negative or not finite.

    Examples:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, bnjax
      >>> from bnjax import tools
      >>> model = nn.Sequential([nn.Conv(4, (3, 3), use_bias=False), bnjax.linen.BatchNorm(True), nn.relu])
      >>> x = jax.random.normal(jax.random.key(0), (1, 8, 8, 3))
      >>> folded = tools.fold(model.apply, model.init(jax.random.key(1), x), x)
      >>> folded.pairs
      (Pair(norm='layers_1', layer='layers_0', side='previous'),)
      >>> jax.tree.map(jnp.shape, folded.stripped)
      {'params': {'layers_0': {'bias': (4,), 'kernel': (3, 3, 3, 4)}}}
      >>> y = folded.apply_fn(folded.stripped, x)
      >>> folded.difference < 1e-5
      True

    References:
      Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
      https://arxiv.org/abs/1712.05877, section 3.2.
    """
    model = program(apply_fn, variables)
    tree = check_variances(_trees.flatten_with_layers(variables))
    matches, left = find_pairs(_outputs(model, variables), x)
    chosen = _trees.select(tree.layers, layers)
    matches, shared = _foldable(tree, [m for m in matches if m.norm.path in chosen], variables)
    folded_paths = [m.norm.path for m in matches]
    why = {**left, **shared}
    left = {path: why.get(path, "it does not run") for path in chosen if path not in folded_paths}
    kept, bare = (_fold_all(tree, matches, keep=keep) for keep in (True, False))
    folded = tree.build(_with(tree, kept))
    if isinstance(variables, nnx.Module):
        stripped, run = strip_module(folded, matches, bare), apply_fn
    else:
        stripped, run = strip(variables, matches, bare), stripped_apply(apply_fn, matches)
    return Folded(
        variables=folded,
        stripped=stripped,
        apply_fn=run,
        pairs=tuple(Pair(show(m.norm.path), show(m.layer.path), m.side) for m in matches),
        left={show(path): reason for path, reason in left.items()},
        difference=_difference(apply_fn(variables, x), run(stripped, x)),
    )


def _outputs(model: Program, variables: Any) -> Program:
    """The program without the variables that it returns for an nnx module: only the output is a use."""
    if not isinstance(variables, nnx.Module):
        return model
    return model._replace(run=lambda state, x: model.run(state, x)[0])


def _foldable(tree: Tree, matches: list[Match], variables: Any) -> tuple[list[Match], dict[Path, str]]:
    """The pairs whose variables are all there, of shapes that go together, and the layer's own."""
    shared = _shared_layers(variables)
    good, left = [], {}
    for match in matches:
        layer, norm = _leaves(tree, match.layer.path), take_row(match.norm, _leaves(tree, match.norm.path))
        if "kernel" not in layer or match.layer.path in shared or match.norm.path in shared:
            left[match.norm.path] = f"its variables, or those of {show(match.layer.path)}, are shared"
        elif layer["kernel"].ndim - match.layer.rank != norm["mean"].ndim - 1:
            left[match.norm.path] = f"{show(match.layer.path)} is not stacked by vmap or scan as it is"
        else:
            good.append(match)
    return good, left


def _shared_layers(variables: Any) -> set[Path]:
    """The modules of an nnx model that share a variable with another one."""
    owners: dict[int, set[Path]] = {}
    if isinstance(variables, nnx.Module):
        for path, module in nnx.iter_modules(variables):
            for value in vars(module).values():
                if isinstance(value, nnx.Variable):
                    owners.setdefault(id(value), set()).add(tuple(map(str, path)))
    return {path for paths in owners.values() if len(paths) > 1 for path in paths}


def _leaves(tree: Tree, path: Path) -> dict[str, jax.Array]:
    return {name[-1]: leaf for name, leaf in zip(tree.names, tree.leaves, strict=True) if name[:-1] == path}


def _fold_all(tree: Tree, matches: list[Match], *, keep: bool) -> Layers:
    """The variables of all layers that take part, after all folds; a layer may take one before and one after it."""
    layers = {site.path: _leaves(tree, site.path) for m in matches for site in (m.norm, m.layer)}
    for match in matches:
        norm, layer = match.norm.path, match.layer.path
        row = take_row(match.norm, layers[norm])
        folded, layers[layer] = fold_pair(match, row, layers[layer], keep=keep)
        if folded is not row:
            layers[norm] = put_row(match.norm, folded, layers[norm])
    return layers


def _with(tree: Tree, layers: Layers) -> list[Any]:
    """The leaves of the tree, those of the layers replaced, in the dtypes they had."""
    return [
        layers[name[:-1]][name[-1]].astype(leaf.dtype)
        if name[:-1] in layers and name[-1] in layers[name[:-1]]
        else leaf
        for name, leaf in zip(tree.names, tree.leaves, strict=True)
    ]


def _difference(y: Any, other: Any) -> float:
    """max|y′ − y| / max|y| over all arrays of the output."""
    pairs = list(zip(jax.tree.leaves(y), jax.tree.leaves(other), strict=True))
    largest = max((float(jnp.max(jnp.abs(a))) for a, _ in pairs if a.size), default=0.0)
    apart = max((float(jnp.max(jnp.abs(a - b))) for a, b in pairs if a.size), default=0.0)
    return apart / largest if largest else apart
