"""Folding batch normalization into the layers around it, for inference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from flax import nnx

from bnjax.tools import _trees
from bnjax.tools._fold._compare import difference, rounding
from bnjax.tools._fold._pairs import Match, Pair, find_pairs
from bnjax.tools._fold._sites import find_sites
from bnjax.tools._fold._strip import strip, strip_module, stripped_apply
from bnjax.tools._fold._variables import fold_all, layers_of, unfit
from bnjax.tools._layers import Program, program
from bnjax.tools._sound import check_variances
from bnjax.tools._trees import show

if TYPE_CHECKING:
    import chex


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


def fold(
    apply_fn: Callable[..., Any], variables: chex.ArrayTree, x: Any, *, layers: Sequence[str] | None = None
) -> Folded:
    r"""Moves batch normalization, as it is in evaluation, into the convolution or dense layer before or after it.

    .. math::
        a = \frac{\mathrm{scale}}{\sqrt{\mathrm{var} + \epsilon}}, \quad c = \mathrm{bias} - a\,\mathrm{mean}:
        \qquad a(W u + b) + c = (aW)\,u + (ab + c), \qquad W(ax + c) + b = (Wa)\,x + (Wc + b)

    Pairs are found in the flow of data of the traced model, never by names: a normalization is folded into the Conv,
    ConvTranspose or Dense (nnx: Linear; grouped and depthwise convolutions too) that makes its input, if nothing else
    uses that; or into all Conv and Dense layers that use its output, such as those that make queries, keys and values,
    if nothing else does and no zeros are padded in between. What cannot be folded is left in place, with the reason.

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
    tree = check_variances(_trees.flatten_with_layers(variables))
    chosen = _trees.select(tree.layers, layers)
    matches, why = find_pairs(find_sites(_outputs(apply_fn, variables), variables, x), tree.names)
    matches = [m for m in matches if m.norm.path in chosen]
    held = layers_of(tree, matches)
    why |= {m.norm.path: reason for m in matches if (reason := unfit(m, held))}
    matches = [m for m in matches if m.norm.path not in why]
    kept, bare = fold_all(layers_of(tree, matches), matches)
    folded = tree.build(
        [_new(leaf, kept.get(name[:-1], {}).get(name[-1])) for name, leaf in zip(tree.names, tree.leaves, strict=True)]
    )
    if isinstance(variables, nnx.Module):
        stripped, run = strip_module(folded, matches, bare), apply_fn
    else:
        stripped, run = strip(variables, matches, bare), stripped_apply(apply_fn, matches)
    taken = {m.norm.path for m in matches}
    return Folded(
        variables=folded,
        stripped=stripped,
        apply_fn=run,
        pairs=tuple(Pair(show(m.norm.path), show(m.layer.path), m.side) for m in matches),
        left={show(path): why.get(path, "it does not run") for path in chosen if path not in taken},
        difference=_difference(apply_fn, variables, folded, run, stripped, matches, x) if matches else 0.0,
    )


def _outputs(apply_fn: Callable[..., Any], variables: Any) -> Program:
    """Returns the program without the variables that it returns for an nnx module: only the output is a use."""
    model = program(apply_fn, variables)
    if not isinstance(variables, nnx.Module):
        return model
    return model._replace(run=lambda state, x: model.run(state, x)[0])


def _new(leaf: Any, value: Any) -> Any:
    """Returns the new value of a leaf in the dtype that it had, if there is one."""
    return leaf if value is None else value.astype(leaf.dtype)


def _difference(
    apply_fn: Callable[..., Any],
    variables: Any,
    folded: Any,
    stripped_fn: Callable[..., Any],
    stripped: Any,
    matches: list[Match],
    x: Any,
) -> float:
    """Returns the difference of `stripped` on the sample; raises ValueError if rounding does not explain it."""
    with jax.default_matmul_precision("highest"):
        run = _jitted(apply_fn, variables)
        y = run(variables, x)
        found = difference(y, _jitted(stripped_fn, stripped)(stripped, x))
        limit = rounding(run, _trees.flatten(variables), matches, x, y)
        furthest = max(found, difference(y, run(folded, x)))
    if not furthest <= limit:
        pairs = [f"{show(m.norm.path)} into {show(m.layer.path)}" for m in matches]
        raise ValueError(
            "the folded network must compute what the model does. On the sample its output is off by "
            f"{furthest:.2g} of the largest, and rounding explains {limit:.2g}; folded were {pairs}. One of them does "
            "a thing that its variables and its evaluation_affine do not say: find it with layers=[...], leave it out."
        )
    return found


def _jitted(apply_fn: Callable[..., Any], variables: Any) -> Callable[[Any, Any], Any]:
    """Returns the model as one compiled program, for other values of its variables too."""
    if not isinstance(variables, nnx.Module):
        return jax.jit(apply_fn)
    graph, _ = nnx.split(variables)
    run = jax.jit(lambda state, x: apply_fn(nnx.merge(graph, state), x))
    return lambda model, x: run(nnx.split(model)[1], x)
