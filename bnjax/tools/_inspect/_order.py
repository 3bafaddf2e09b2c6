"""The order of rows: that of execution where something remembers it, else that of the names, 10 after 9."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flax import nnx

from bnjax.tools._trees import COLLECTIONS, Path


def in_order(layers: Iterable[Path], variables: Any, moments: Iterable[str]) -> list[Path]:
    """Returns the layers in the order in which they run, as far as it is known.

    A dict that went through `jit` or a checkpoint is sorted by name, and remembers nothing. One that is not sorted,
    such as the variables that `init` returns, has its entries in the order in which the layers ran; so have moments.
    A module has its attributes in the order in which they were made.

    Args:
      layers: their paths.
      variables: the tree that they are in.
      moments: the names of the layers that moments are known of, in the order in which they came.
    """
    met = [tuple(name.split("/")) for name in moments]
    ranks: dict[Path, int] = {}
    for path in (*(met if met != sorted(met) else ()), *_paths(variables)):
        ranks.setdefault(path, len(ranks))
    return sorted(sorted(layers, key=_as_counted), key=lambda layer: ranks.get(layer, len(ranks)))


def _as_counted(path: Path) -> list[list[tuple[int, str]]]:
    """Returns a key by which `norm_10` comes after `norm_9`."""
    parts = [re.split(r"(\d+)", name) for name in path]
    return [[(int(part), "") if part.isdecimal() else (-1, part) for part in name] for name in parts]


def _paths(node: Any, so_far: Path = ()) -> Iterator[Path]:
    """Returns the paths of all nodes of a tree, a node before what is in it."""
    yield so_far
    for name, child in _children(node):
        collection = not so_far and name in COLLECTIONS
        yield from _paths(child, so_far if collection else (*so_far, name))


def _children(node: Any) -> list[tuple[str, Any]]:
    """Returns what is in a node, by name, in the order that it remembers, or by name as people count."""
    if isinstance(node, nnx.Module):
        return [(str(name), child) for name, child in vars(node).items()]
    if isinstance(node, (list, tuple)):
        return [(str(i), child) for i, child in enumerate(node)]
    if not isinstance(node, Mapping):
        return []
    items = [(str(name), child) for name, child in node.items()]
    names = [name for name, _ in items]
    return items if names != sorted(names) else sorted(items, key=lambda item: _as_counted((item[0],)))
