"""Batch normalization layers in a tree of variables, found by their statistics.

One view of all the trees that hold variables: linen collections (`{"params": ..., "batch_stats": ...}`, frozen or not,
one collection alone, a TrainState), nnx states (whole, split, or turned into pure dicts), nnx modules, and what Orbax
restores of them. A layer is a node that owns the leaves `mean` and `var`, of one shape; its `scale` and `bias` have the
same path in the collection `params`, or sit beside them. Leading axes of vmapped and scanned layers need no care.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import jax
from flax import nnx
from flax.core.meta import AxisMetadata

from bnjax.functional import Moments

Path = tuple[str, ...]  # names from the root to a layer or a leaf; the collection is left out

COLLECTIONS = ("params", "batch_stats")
STATISTICS = ("mean", "var", "steps", "skipped")  # the last two, counters of batches, where they are wanted
ROLES = (*STATISTICS, "scale", "bias")


class Tree(NamedTuple):
    """A flattened tree of variables, and where its batch normalization layers are."""

    names: list[Path]  # of each leaf
    leaves: list[Any]
    layers: dict[Path, dict[str, int]]  # layer -> role -> index of the leaf; "mean" and "var" are always there
    build: Callable[[list[Any]], Any]  # new leaves -> a tree of the structure that was given

    def stats(self, layer: Path) -> dict[str, jax.Array]:
        """Returns the statistics of a layer: the running mean and variance, and the steps where they are counted."""
        return {role: self.leaves[i] for role, i in self.layers[layer].items() if role in STATISTICS}

    def replace(self, values: Mapping[Path, Mapping[str, Any]]) -> Any:
        """Returns the tree with new leaves for `values[layer][role]`, in the dtypes of the old ones."""
        leaves = list(self.leaves)
        for layer, roles in values.items():
            for role, at in self.layers[layer].items():
                if role in roles:
                    leaves[at] = roles[role].astype(leaves[at].dtype)
        return self.build(leaves)


def flatten(tree: Any) -> Tree:
    """Flattens a tree, with or without layers; an nnx module is read through its state, and built anew."""
    if isinstance(tree, nnx.Module):
        graph, state = nnx.split(tree)
        flat = flatten(state)
        return flat._replace(build=lambda leaves: nnx.merge(graph, flat.build(leaves)))
    keyed, structure = jax.tree_util.tree_flatten_with_path(tree)
    raw = [_raw_names(keys) for keys, _ in keyed]
    names, leaves = [_without_collection(r, tree) for r in raw], [leaf for _, leaf in keyed]
    return Tree(names, leaves, _find_layers(raw, names, leaves), partial(jax.tree.unflatten, structure))


def flatten_with_layers(tree: Any) -> Tree:
    """Flattens a tree for functions that need statistics; raises ValueError for one that holds none."""
    flat = flatten(tree)
    if not flat.layers:
        top = sorted({name[0] for name in flat.names if name})
        raise ValueError(
            "the tree holds no batch normalization statistics: no node of it owns leaves 'mean' and 'var' of one "
            f"shape; its top-level names are {top}. Pass the linen variables or their 'batch_stats' collection, or an "
            "nnx state that contains the nnx.BatchStat variables."
        )
    return flat


def is_box(node: Any) -> bool:
    """Returns whether a node is a variable or a metadata box around one array."""
    return isinstance(node, (nnx.Variable, AxisMetadata))


def label_leaves(tree: Any, label: Callable[[Path], Any]) -> Any:
    """Returns a tree of `label(path)` that fits a state with variables and one with arrays: boxes are leaves of it."""
    keyed, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_box)
    return jax.tree.unflatten(structure, [label(_without_collection(_raw_names(keys), tree)) for keys, _ in keyed])


def show(path: Path) -> str:
    """Returns a path as people write it."""
    return "/".join(path) or "(the root)"


def by_layer(moments: Mapping[str, Any] | None) -> dict[str, Moments]:
    """Returns moments by the layer's name, from that, or from the collection `moments` of
    :class:`bnjax.linen.BatchNorm`.
    """
    found: dict[str, Moments] = {}
    for name, node in (moments or {}).items():
        if isinstance(node, Moments):
            found[name] = node
        elif isinstance(node, Mapping) and set(node) == set(Moments._fields):
            found[name] = Moments(**node)
        elif isinstance(node, Mapping):
            found |= {f"{name}/{below}": m for below, m in by_layer(node).items()}
        else:
            raise ValueError(f"moments must map layers to bnjax.Moments; got {type(node).__name__} at {name!r}.")
    return found


def matches(path: Path, pattern: str) -> bool:
    """Returns whether a glob over '/'-joined names fits the path, a module above it, or their last names."""
    name = "/".join(path)
    return any(fnmatchcase(name, p) for p in (pattern, f"*/{pattern}", f"{pattern}/*", f"*/{pattern}/*"))


def select(paths: Iterable[Path], layers: Sequence[str] | None) -> list[Path]:
    """Returns the paths that any of the patterns fits, all for None; raises ValueError for one that fits none."""
    paths, patterns = list(paths), check_patterns(layers)
    if patterns is None:
        return paths
    for pattern in patterns:
        if not any(matches(path, pattern) for path in paths):
            raise ValueError(f"layers: {pattern!r} fits no layer; the layers are {[show(p) for p in paths]}.")
    return [path for path in paths if any(matches(path, p) for p in patterns)]


def check_patterns(layers: Sequence[str] | None) -> tuple[str, ...] | None:
    """Returns the patterns of layers, None for all; raises ValueError for one string, and where there are none."""
    if isinstance(layers, str):
        raise ValueError(f"layers must be a sequence of patterns; got the string {layers!r}: write [{layers!r}].")
    if layers is not None and len(layers) == 0:
        raise ValueError("layers is empty, so no layer is named: name some, or leave it out for all of them.")
    return None if layers is None else tuple(layers)


def _raw_names(keys: Sequence[Any]) -> Path:
    """Returns a key path as names, without the `value` that boxes put below a variable's name, also in checkpoints."""
    names = tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in keys)
    return names[:-1] if len(names) > 1 and names[-1] == "value" else names


def _without_collection(names: Path, tree: Any) -> Path:
    """Drops the position in a tuple of states, then the name of the collection."""
    if isinstance(tree, (tuple, list)) and not hasattr(tree, "_fields"):
        names = names[1:]
    return names[1:] if names[:1] and names[0] in COLLECTIONS else names


def _find_layers(raw: list[Path], names: list[Path], leaves: list[Any]) -> dict[Path, dict[str, int]]:
    nodes: dict[Path, dict[str, int]] = {}
    gathered = any(r[:1] == ("batch_stats",) for r in raw)  # then `moments` beside it is that collection, no module
    for i, name in enumerate(names):
        if gathered and raw[i][0] == "moments":
            continue
        if name and name[-1] in ROLES and _may_hold(raw[i], name[-1]):
            nodes.setdefault(name[:-1], {})[name[-1]] = i
    return {path: at for path, at in nodes.items() if _is_layer(at, leaves)}


def _may_hold(raw: Path, role: str) -> bool:
    """Returns whether a leaf is where linen keeps it: statistics in `batch_stats`, scale and bias in `params`."""
    return raw[0] not in COLLECTIONS or (raw[0] == "batch_stats") == (role in STATISTICS)


def _is_layer(at: Mapping[str, int], leaves: list[Any]) -> bool:
    if not {"mean", "var"} <= at.keys():
        return False
    mean, var = leaves[at["mean"]], leaves[at["var"]]
    return hasattr(mean, "shape") and mean.shape == getattr(var, "shape", None)
