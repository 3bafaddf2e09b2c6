"""What all converters share: each leaf's name elsewhere, and a complete correspondence in both directions."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from bnjax.tools import _trees
from bnjax.tools._sound import check_variances
from bnjax.tools._trees import Path, show

Array = np.ndarray[Any, Any]


class Dialect(NamedTuple):
    """The words of another library."""

    library: str
    separator: str
    norm: Mapping[str, str]  # role -> word, in modules that normalise
    weight: Mapping[str, str]  # role -> word, in all others


class Leaf(NamedTuple):
    """One leaf of the variables, and its name elsewhere."""

    key: str
    module: str  # its path, joined
    role: str
    shape: tuple[int, ...]


def leaves_of(tree: _trees.Tree, dialect: Dialect, names: Mapping[str, str]) -> list[Leaf]:
    """What each leaf is called in the other library; `names` gives the names of modules."""
    modules = {name[:-1] for name in tree.names}
    unknown = sorted(set(names) - {"/".join(module) for module in modules})
    if unknown:
        raise ValueError(f"names: {unknown} are no modules of the variables; these are {sorted(map(show, modules))}.")
    norms = {name[:-1] for name in tree.names if name[-1] == "scale"} | tree.layers.keys()
    return [
        Leaf(key_of(name[:-1], name[-1], dialect, names, norm=name[:-1] in norms), "/".join(name[:-1]), name[-1], shape)
        for name, shape in zip(tree.names, map(jnp.shape, tree.leaves), strict=True)
    ]


def key_of(path: Path, role: str, dialect: Dialect, names: Mapping[str, str], *, norm: bool) -> str:
    """The name of one variable in the other library."""
    word = (dialect.norm if norm else dialect.weight).get(role)
    if word is None:
        raise ValueError(f"{show((*path, role))} has no counterpart in {dialect.library}: convert a tree without it.")
    prefix = names.get("/".join(path), dialect.separator.join(path))
    return f"{prefix}{dialect.separator}{word}" if prefix else word


def filled(
    tree: _trees.Tree, leaves: list[Leaf], state: Mapping[str, Any], convert: Callable[[Array, Leaf], Array]
) -> Any:
    """The tree with the values of `state`; raises ValueError for names, shapes or variances that do not fit."""
    wanted = {leaf.key for leaf in leaves}
    spare, missing = sorted(state.keys() - wanted), sorted(wanted - state.keys())
    if spare or missing:
        raise ValueError(
            f"state and variables do not correspond: state lacks {missing} and has {spare} besides. Say in "
            "names={...} what the modules are called in it."
        )
    values = []
    for leaf, old in zip(leaves, tree.leaves, strict=True):
        value = convert(np.asarray(state[leaf.key]), leaf)
        if value.shape != leaf.shape:
            raise ValueError(
                f"{leaf.key} has shape {value.shape} in Flax's order of axes; {leaf.module}/{leaf.role} has "
                f"{leaf.shape}."
            )
        values.append(jnp.asarray(value, old.dtype))
    return check_variances(tree._replace(leaves=values)).build(values)
