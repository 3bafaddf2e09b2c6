"""PyTorch state dicts to variables and back: names, layouts, and what the words mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bnjax.tools.convert._correspondence import (
    Array,
    Dialect,
    Leaf,
    below,
    check_distinct,
    copied,
    key_of,
    leaves_of,
    tree_of,
    with_end,
)
from bnjax.tools.convert._fill import filled, with_steps
from bnjax.tools.convert._kernels import kernels_of
from bnjax.tools.convert._layers import layers_of, order_of
from bnjax.tools.convert._propose import advice, propose
from bnjax.tools.convert._torch_layout import flattened_of, to_flax_axes, to_torch_axes
from bnjax.tools.convert._torch_state import array_of, tensors_of, transposed_of, wrapper_of

if TYPE_CHECKING:
    import chex

TORCH = Dialect(
    library="PyTorch",
    separator=".",
    norm={
        "scale": "weight",
        "bias": "bias",
        "mean": "running_mean",
        "var": "running_var",
        "steps": "num_batches_tracked",
    },
    weight={"kernel": "weight", "embedding": "weight", "bias": "bias", "negative_slope": "weight"},
)


def from_torch(
    state: Any,
    variables: chex.ArrayTree,
    *,
    names: Mapping[str, str] | None = None,
    prefix: str = "",
    flattened: Mapping[str, Sequence[int]] | None = None,
    transposed: Sequence[str] | None = None,
    partial: Sequence[str] | None = None,
    steps: float | None = None,
    apply_fn: Callable[..., Any] | None = None,
    x: Any = None,
) -> Any:
    r"""Returns variables with the values of a PyTorch `state_dict`.

    .. math:: K_{h,w,i,o} = W_{o,i,h,w}, \qquad \mathrm{scale}, \mathrm{bias}, \mathrm{mean}, \mathrm{var} =
              \mathtt{weight}, \mathtt{bias}, \mathtt{running\_mean}, \mathtt{running\_var}

    PyTorch's `running_var` is divided by n − 1 where Flax's is divided by n; it is taken as it is, and
    `unbiased_var=True` goes on averaging it in that way. See :func:`fields_from_torch` for momentum and epsilon, which
    a state dict does not hold. Padding is not in it either: `nn.Conv(..., padding=1, stride=2)` of PyTorch is
    `padding=((1, 1), (1, 1))` in Flax, never `"SAME"`, and padding p of a transposed convolution with kernels of size k
    is `padding=k - 1 - p`.

    Kernels of transposed convolutions are mirrored. Which ones these are is read from an nnx module, or from a linen
    model that is traced with `apply_fn` and `x`, or from a torch module that is given as `state`; without these from
    `transposed` and from shapes. Where in and out channels are equal the shape says nothing, and a kernel of which
    nothing else does is refused.

    Args:
      state: `[...]` arrays or tensors by name: a `state_dict` (with gradients, in any dtype, on any device), a
        checkpoint that holds one (`{"state_dict": ...}`), the torch module itself, or :func:`read_arrays` of a file.
      variables: what to fill: linen variables, an nnx state or an nnx module, of the shapes of the same network;
        `jax.eval_shape` of an `init` is enough.
      names: which module of `variables` has which name in `state`: `{"Conv_0": "features.0", "block/bn": "l1.bn"}`;
        modules below it follow. By default the path with `.` for `/`. An error proposes a map, and
        :func:`propose_names` returns it.
      prefix: what the wanted names in `state` begin with, such as `"backbone."`; others are left out. The prefixes of
        PyTorch's own wrappers, `module.` and `_orig_mod.`, need not be given.
      flattened: dense layers that read flattened channels, by path: the shape `(C, H, W)` before flattening. PyTorch
        flattens channels first, Flax last.
      transposed: paths of all transposed convolutions (`()` for none), where the modules are not known; those with
        `transpose_kernel=True` count as convolutions, as Flax then keeps their kernels as the others do.
      partial: patterns of modules that keep their values where `state` has none of their names and shapes, such as
        `["head"]`; the result is then a :class:`Loaded`, which says what stayed.
      steps: how many batches the averages are worth, for layers that count them, where `state` has no count.
      apply_fn: a linen model, as `apply_fn(variables, x)`.
      x: its sample input, arrays or `jax.ShapeDtypeStruct`.

    Returns:
      `variables` with all its leaves from `state`, in their own dtypes; `num_batches_tracked` goes where steps are
      counted. Statistics, scales and biases may have axes of size one besides, such as `(1, 1, C)`. Random states and
      the counts of skipped batches stay as they are. With `partial` it is `Loaded(variables, kept, unused)`.

    Raises:
      ValueError: names or shapes that do not correspond, in either direction: nothing is left out in silence;
        two modules of one name; a kernel that may or may not be transposed; a running variance that is negative or not
        finite.

    Examples:
      >>> import jax, jax.numpy as jnp, numpy as np, flax.linen as nn, bnjax
      >>> from bnjax import tools
      >>> norm = bnjax.linen.BatchNorm(use_running_average=True, **tools.fields_from_torch())
      >>> variables = norm.init(jax.random.key(0), jnp.ones((1, 2)))
      >>> state = {"bn.weight": np.ones(2), "bn.bias": np.zeros(2), "bn.running_mean": np.array([1.0, 2.0]),
      ...          "bn.running_var": np.ones(2), "bn.num_batches_tracked": np.array(7)}
      >>> tools.from_torch(state, variables, prefix="bn")["batch_stats"]["mean"]
      Array([1., 2.], dtype=float32)
    """
    tree, tensors = tree_of(variables), tensors_of(state)
    leaves = leaves_of(variables, tree, TORCH, names)
    prefix = with_end(prefix, TORCH) or wrapper_of(tensors, (leaf.key for leaf in leaves))
    counted = {leaf.key for leaf in leaves if leaf.role == "steps"}
    tensors = {
        key: value
        for key, value in below(tensors, prefix).items()
        if key in counted or not key.endswith("num_batches_tracked")
    }
    layers = layers_of(variables, apply_fn, x)
    there = {prefix + leaf.key.rpartition(".")[0]: leaf.module for leaf in leaves}
    elsewhere = {there[name]: known for name, known in transposed_of(state).items() if name in there}
    tensors = with_steps(tensors, leaves, steps)
    kernels, shapes = kernels_of(leaves, layers, transposed, elsewhere), flattened_of(flattened, leaves)

    def convert(value: Any, leaf: Leaf) -> Array:
        array = array_of(leaf.key, value)
        return (
            np.broadcast_to(array, leaf.shape) if leaf.role == "steps" else to_flax_axes(array, leaf, shapes, kernels)
        )

    def proposed() -> str:
        return advice(propose(tensors, leaves, TORCH, order_of(variables, layers)), TORCH)

    return filled(tree, check_distinct(leaves), tensors, convert, layers, advice=proposed, partial=partial)


def to_torch(
    variables: chex.ArrayTree,
    *,
    names: Mapping[str, str] | None = None,
    prefix: str = "",
    flattened: Mapping[str, Sequence[int]] | None = None,
    transposed: Sequence[str] | None = None,
    apply_fn: Callable[..., Any] | None = None,
    x: Any = None,
) -> dict[str, Array]:
    r"""Returns a PyTorch `state_dict` with the values of variables: the inverse of :func:`from_torch`.

    .. math:: W_{o,i,h,w} = K_{h,w,i,o}

    Args:
      variables: linen variables, an nnx state or an nnx module, of any shapes, with batch normalization or folded.
      names: as in :func:`from_torch`.
      prefix: what the names shall begin with.
      flattened: as in :func:`from_torch`.
      transposed: as in :func:`from_torch`.
      apply_fn: as in :func:`from_torch`.
      x: as in :func:`from_torch`.

    Returns:
      NumPy arrays by name, each a copy of its own; `module.load_state_dict({k: torch.tensor(v) for k, v in
      ....items()})` takes them. Dtypes that PyTorch does not take from NumPy, such as bfloat16, become float32. Each
      normalization has its `num_batches_tracked`, 0 where no steps are counted.

    Raises:
      ValueError: nothing in the tree, or parameters of a normalization without its statistics; names that are not of
        its modules; two modules of one name; a kernel that may or may not be transposed.

    Examples:
      >>> import jax.numpy as jnp
      >>> from bnjax import tools
      >>> stats = {"batch_stats": {"bn": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}}
      >>> sorted(tools.to_torch(stats))
      ['bn.num_batches_tracked', 'bn.running_mean', 'bn.running_var']
    """
    tree = tree_of(variables)
    leaves = check_distinct(leaves_of(variables, tree, TORCH, names, prefix))
    kernels = kernels_of(leaves, layers_of(variables, apply_fn, x), transposed)
    shapes = flattened_of(flattened, leaves)
    state = {
        leaf.key: copied(to_torch_axes(np.asarray(tree.leaves[leaf.at]), leaf, shapes, kernels)) for leaf in leaves
    }
    for layer in tree.layers:
        state.setdefault(key_of(layer, "steps", TORCH, names or {}, prefix, norm=True), np.zeros((), np.int64))
    return state


def fields_from_torch(momentum: float | None = 0.1, eps: float = 1e-5) -> dict[str, Any]:
    r"""Returns the fields of `bnjax.BatchNorm` for the arguments of `torch.nn.BatchNorm2d`.

    .. math:: \mathrm{momentum} = 1 - \mathrm{momentum}_\text{torch}

    Args:
      momentum: PyTorch's: the weight of the NEW value, or None for the plain average.
      eps: PyTorch's epsilon.

    Returns:
      `momentum`, `epsilon` and `unbiased_var`.

    Raises:
      ValueError: momentum outside [0, 1].

    Examples:
      >>> from bnjax import tools
      >>> tools.fields_from_torch(momentum=0.25)
      {'momentum': 0.75, 'epsilon': 1e-05, 'unbiased_var': True}
    """
    if momentum is not None and not 0 <= momentum <= 1:
        raise ValueError(f"PyTorch's momentum is the weight of the NEW value and must be in [0, 1]; got {momentum}.")
    return dict(momentum=None if momentum is None else 1 - momentum, epsilon=eps, unbiased_var=True)
