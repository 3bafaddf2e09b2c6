"""Variables with the values of another library's state: a complete correspondence, or a partial one with its report."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bnjax.tools import _trees
from bnjax.tools._sound import check_variances
from bnjax.tools._trees import Tree, show
from bnjax.tools.convert._correspondence import Array, Leaf
from bnjax.tools.convert._layers import Layer
from bnjax.tools.convert._options import shortened


class Loaded(NamedTuple):
    """What :func:`from_torch` or :func:`from_keras` made with `partial`.

    Attributes:
      variables: of the structure that was given.
      kept: the modules that kept the values they had, and why: `{"head": "head.weight has shape ...", ...}`.
      unused: the names in `state` that went nowhere.

    Examples:
      >>> import jax.numpy as jnp, numpy as np
      >>> from bnjax import tools
      >>> variables = {"params": {"body": {"kernel": jnp.zeros((2, 3))}, "head": {"kernel": jnp.zeros((3, 10))}}}
      >>> state = {"body.weight": np.ones((3, 2)), "head.weight": np.ones((1000, 3))}
      >>> loaded = tools.from_torch(state, variables, partial=["head"])
      >>> print(loaded.kept["head"], loaded.unused)
      head.weight has shape (3, 1000) in Flax's order of axes; head/kernel has (3, 10) ('head.weight',)
    """

    variables: Any
    kept: dict[str, str]
    unused: tuple[str, ...]


def filled(
    tree: Tree,
    leaves: Sequence[Leaf],
    state: Mapping[str, Any],
    convert: Callable[[Any, Leaf], Array],
    layers: Mapping[str, Layer],
    *,
    advice: Callable[[], str],
    partial: Sequence[str] | None = None,
) -> Any:
    """Returns the tree with the values of `state`, as a `Loaded` where `partial` says which modules may stay as they
    are.

    Args:
      tree: what to fill.
      leaves: what each leaf is called in `state`.
      state: arrays by name.
      convert: makes of a value of `state` an array in Flax's order of axes.
      layers: what is known of the modules, by name.
      advice: what an error adds on names that do not correspond.
      partial: patterns of modules that keep their values where `state` has none that fit.

    Raises:
      ValueError: names, shapes or variances that do not fit, but for the modules of `partial`.
    """
    by_module: dict[str, list[Leaf]] = {}
    for leaf in leaves:
        by_module.setdefault(leaf.module, []).append(leaf)
    may_stay = _may_stay(by_module, partial)
    missing = [leaf.key for leaf in leaves if leaf.key not in state and leaf.module not in may_stay]
    spare = sorted(state.keys() - {leaf.key for leaf in leaves}) if partial is None else []
    if missing or spare:
        raise ValueError(
            f"state and variables do not correspond: state lacks {shortened(missing)} and has {shortened(spare)} "
            f"besides. {advice()}"
        )
    values, kept, used = dict[int, jax.Array](), dict[str, str](), set[str]()
    for module, held in by_module.items():
        new, why = _converted(held, state, convert)
        if not (why or layers.get(module, Layer()).keeps_mean):
            why = _has_means(held, new)
        if why and module not in may_stay:
            raise ValueError(f"{why}. If {module or 'it'} should keep the values it has: partial=[{module!r}].")
        if why:
            kept[module] = why
        else:
            used |= {leaf.key for leaf in held}
            values |= {leaf.at: jnp.array(v, tree.leaves[leaf.at].dtype) for leaf, v in zip(held, new, strict=True)}
    if not used:
        raise ValueError(f"nothing in state fits the variables: it has {shortened(state)}. {advice()}")
    result = [values.get(at, leaf) for at, leaf in enumerate(tree.leaves)]
    result = [_initial(tree, at) if isinstance(v, jax.ShapeDtypeStruct) else v for at, v in enumerate(result)]
    variables = check_variances(tree._replace(leaves=result)).build(result)
    return variables if partial is None else Loaded(variables, kept, tuple(key for key in state if key not in used))


def with_steps(state: Mapping[str, Any], leaves: Sequence[Leaf], steps: float | None) -> dict[str, Any]:
    """Returns the state, with a count of batches for each layer that counts them and finds averages alone."""
    averages = {leaf.module for leaf in leaves if leaf.role == "mean" and leaf.key in state}
    lacking = [leaf for leaf in leaves if leaf.role == "steps" and leaf.key not in state and leaf.module in averages]
    if lacking and steps is None:
        raise ValueError(
            f"{shortened(leaf.module for leaf in lacking)} count batches, and the state has no count: say steps=..., "
            "how many batches its averages are worth. With 0 the next batch may replace them."
        )
    return {**state, **{leaf.key: np.asarray(steps) for leaf in lacking}}


def reshaped(value: Array, shape: tuple[int, ...]) -> Array:
    """Returns the array in a shape that differs by axes of size one; as it is where it differs by more."""
    without = [tuple(n for n in s if n != 1) for s in (value.shape, shape)]
    return value.reshape(shape) if without[0] == without[1] else value


def _converted(
    held: Sequence[Leaf], state: Mapping[str, Any], convert: Callable[[Any, Leaf], Array]
) -> tuple[list[Array], str]:
    """Returns the values of one module, or why there are none: half a module would be neither of the two networks."""
    values = []
    for leaf in held:
        if leaf.key not in state:
            return [], f"{leaf.key} is not in the state"
        value = convert(state[leaf.key], leaf)
        if leaf.role not in ("kernel", "embedding"):
            value = reshaped(value, leaf.shape)
        if value.shape != leaf.shape:
            here = f"{leaf.module}/{leaf.role} has {leaf.shape}"
            return [], f"{leaf.key} has shape {value.shape} in Flax's order of axes; {here}"
        values.append(value)
    return values, ""


def _has_means(held: Sequence[Leaf], values: Sequence[Array]) -> str:
    """Returns why a layer that keeps no mean cannot take these values; empty if their means are 0."""
    for leaf, value in zip(held, values, strict=True):
        if leaf.role == "mean" and np.any(value):
            return f"{leaf.key} holds means that are not 0, and {leaf.module} is a layer that subtracts none"
    return ""


def _may_stay(modules: Mapping[str, Any], partial: Sequence[str] | None) -> set[str]:
    if isinstance(partial, str):
        raise ValueError(f"partial holds patterns of modules; got the string {partial!r}: write [{partial!r}].")
    fitting = {p: [m for m in modules if _trees.matches(tuple(m.split("/")), p)] for p in partial or ()}
    for pattern, found in fitting.items():
        if not found:
            raise ValueError(f"partial: {pattern!r} fits no module of the variables; these are {shortened(modules)}.")
    return {module for found in fitting.values() for module in found}


def _initial(tree: Tree, at: int) -> jax.Array:
    """Returns what a leaf without a value starts as, where it is known: counters do at zero."""
    name, leaf = tree.names[at], tree.leaves[at]
    if name[-1] in ("skipped", "steps"):
        return jnp.zeros(leaf.shape, leaf.dtype)
    raise ValueError(
        f"{show(name)} gets no value from state and has none, as variables came from eval_shape: initialise them."
    )
