"""What all converters share: the leaves of the variables, and what each is called in the other library."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from bnjax.tools import _trees
from bnjax.tools._trees import Path, Tree, show
from bnjax.tools.convert._options import check_mapping, check_modules, shortened

Array = np.ndarray[Any, Any]

_COUNTER_OF_OURS = "skipped"  # refused batches, which no other library counts
_NAMED_NORM = re.compile(r"\w*(BatchNorm|BatchRenorm)_\d+")  # the names that linen gives by itself


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
    at: int  # its place among the leaves of the tree
    normalises: bool  # whether its module does


def tree_of(variables: Any) -> Tree:
    """Returns the variables, with or without statistics; raises ValueError where something must have been forgotten."""
    tree = _trees.flatten(variables)
    if not tree.names:
        raise ValueError(
            "the tree holds no batch normalization statistics, nor anything else to convert: pass linen variables, an "
            "nnx module or its state."
        )
    norms = [name[:-1] for name in tree.names if len(name) > 1 and _NAMED_NORM.fullmatch(name[-2])]
    if norms and not tree.layers:
        raise ValueError(
            f"the tree holds no batch normalization statistics, and {show(norms[0])} must have some: pass both "
            'collections, {"params": ..., "batch_stats": ...}.'
        )
    return tree


def leaves_of(
    variables: Any, tree: Tree, dialect: Dialect, names: Mapping[str, str] | None, prefix: str = ""
) -> list[Leaf]:
    """Returns what each leaf is called in the other library; raises ValueError where two get one name.

    `names` gives modules, and all that is below them, their names; `prefix` goes before every name. Random states of
    nnx and counters of refused batches are in no other library, and are left out.
    """
    names = check_mapping("names", names, '{"Conv_0": "features.0"}')
    modules = dict.fromkeys("/".join(name[:at]) for name in tree.names for at in range(len(name)))
    check_modules("names", names, list(modules), "variables")
    norms = {name[:-1] for name in tree.names if name[-1] == "scale"} | tree.layers.keys()
    random = _random_states(variables)
    leaves = []
    for at, (name, leaf) in enumerate(zip(tree.names, tree.leaves, strict=True)):
        path, role = name[:-1], name[-1]
        if role != _COUNTER_OF_OURS and name not in random:
            key = key_of(path, role, dialect, names, prefix, norm=path in norms)
            leaves.append(Leaf(key, "/".join(path), role, tuple(leaf.shape), at, path in norms))
    return leaves


def key_of(path: Path, role: str, dialect: Dialect, names: Mapping[str, str], prefix: str = "", *, norm: bool) -> str:
    """Returns the name of one variable in the other library."""
    word = (dialect.norm if norm else dialect.weight).get(role)
    if word is None:
        raise ValueError(f"{show((*path, role))} has no counterpart in {dialect.library}: convert a tree without it.")
    name = name_of(path, dialect, names)
    return with_end(prefix, dialect) + (f"{name}{dialect.separator}{word}" if name else word)


def name_of(path: Path, dialect: Dialect, names: Mapping[str, str]) -> str:
    """Returns the name of a module: that in `names`, or below that of the nearest module there that holds it."""
    for length in range(len(path), -1, -1):
        above = "/".join(path[:length])
        if above in names:
            return dialect.separator.join(part for part in (names[above], *path[length:]) if part)
    return dialect.separator.join(path)


def with_end(prefix: str, dialect: Dialect) -> str:
    """Returns a prefix as it stands before names, whether its separator was written or not."""
    return prefix if not prefix or prefix.endswith(dialect.separator) else prefix + dialect.separator


def below(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Returns the part of a state whose names begin with the prefix, without it; raises ValueError if no name does."""
    part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if state and not part:
        raise ValueError(f"no name in state begins with prefix={prefix!r}; they are {shortened(state)}.")
    return part


def check_distinct(leaves: list[Leaf]) -> list[Leaf]:
    """Returns the leaves; raises ValueError where modules would overwrite each other."""
    twice = {key for key, count in Counter(leaf.key for leaf in leaves).items() if count > 1}
    if twice:
        key = min(twice)
        modules = [leaf.module or "(the root)" for leaf in leaves if leaf.key == key]
        raise ValueError(f"the modules {modules} get one name elsewhere, {key}: give each its own in names={{...}}.")
    return leaves


def copied(value: Array) -> Array:
    """Returns a contiguous copy that may be written to; dtypes that NumPy does not have by itself, as float32."""
    return np.array(value, np.float32 if value.dtype.kind == "V" else value.dtype, order="C")


def _random_states(variables: Any) -> set[Path]:
    """Returns the paths of the random states in an nnx module or state."""
    state = nnx.state(variables) if isinstance(variables, nnx.Module) else variables
    if not isinstance(state, nnx.State):
        return set()
    return {tuple(map(str, path)) for path, held in nnx.to_flat_state(state) if isinstance(held, nnx.RngState)}
