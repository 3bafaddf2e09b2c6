"""The map of names, proposed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bnjax.tools.convert._correspondence import below, leaves_of, tree_of
from bnjax.tools.convert._haiku import HAIKU
from bnjax.tools.convert._keras import KERAS
from bnjax.tools.convert._keras_state import weights_of
from bnjax.tools.convert._layers import layers_of, order_of
from bnjax.tools.convert._propose import propose
from bnjax.tools.convert._torch import TORCH
from bnjax.tools.convert._torch_state import tensors_of, wrapper_of

if TYPE_CHECKING:
    import chex

_LIBRARIES = {"torch": TORCH, "keras": KERAS, "haiku": HAIKU}


def propose_names(
    state: Any, variables: chex.ArrayTree, *, library: str, apply_fn: Callable[..., Any] | None = None, x: Any = None
) -> dict[str, str]:
    r"""Returns the argument `names` of :func:`from_torch`, :func:`from_keras` and :func:`from_haiku`, proposed.

    Two modules are a pair where their variables have the same shapes, in any order of axes, and

    .. math:: \text{one's name ends as the other's} \quad \text{or} \quad
              i\text{-th of these shapes here} \leftrightarrow i\text{-th of these shapes there}

    The order there is that of the state, or of numbers in names that differ by nothing else (`Conv_9`, `Conv_10`); here
    it is that in which an nnx module defines its layers, or in which a linen model runs them (`apply_fn`, `x`), or
    again that of numbers. Modules that follow upon alike ones are paired first, so that branches may come in another
    order. What none of these decides is left out, and so is a shape of which one side has more modules than the other.
    It is a proposal: compare the outputs of both networks once.

    Args:
      state: as for the converter, arrays of any shapes by name; for Haiku `{**params, **state}`.
      variables: linen variables, an nnx state or an nnx module, or their shapes (`jax.eval_shape` of an `init`).
      library: "torch", "keras" or "haiku".
      apply_fn: a linen model, as `apply_fn(variables, x)`.
      x: its sample input, arrays or `jax.ShapeDtypeStruct`.

    Returns:
      Names in `state` by the paths of modules, without the prefixes of PyTorch's wrappers.

    Raises:
      ValueError: another library, or something that is no state.

    Examples:
      >>> import jax.numpy as jnp, numpy as np
      >>> from bnjax import tools
      >>> variables = {"params": {f"Dense_{i}": {"kernel": jnp.ones((2, 3 - i))} for i in range(2)}}
      >>> state = {"net.0.weight": np.ones((3, 2)), "net.2.weight": np.ones((2, 2))}
      >>> tools.propose_names(state, variables, library="torch")
      {'Dense_0': 'net.0', 'Dense_1': 'net.2'}
    """
    if library not in _LIBRARIES:
        raise ValueError(f"library must be one of {sorted(_LIBRARIES)}; got {library!r}.")
    read = {"torch": tensors_of, "keras": weights_of, "haiku": _flat}[library]
    leaves = leaves_of(variables, tree_of(variables), _LIBRARIES[library], None)
    order, arrays = order_of(variables, layers_of(variables, apply_fn, x)), read(state)
    if library == "torch":
        arrays = below(arrays, wrapper_of(arrays, (leaf.key for leaf in leaves)))
    return propose(arrays, leaves, _LIBRARIES[library], order).names


def _flat(nested: Any) -> dict[str, Any]:
    return {f"{module}/{name}": value for module, held in nested.items() for name, value in held.items()}
