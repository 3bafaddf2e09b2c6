"""Which module of the variables is which in another library's state: by their names, shapes and order."""

import math
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from bnjax.tools.convert._correspondence import Dialect, Leaf
from bnjax.tools.convert._options import natural, shortened

Shape = tuple[int, ...]


class Module(NamedTuple):
    """A module of either side: its name there, and the shapes of its variables by the other library's words."""

    name: str
    shapes: dict[str, Shape]
    before: Hashable = None  # what the module before it looks like


class Proposal(NamedTuple):
    """A map of modules, and those of either side that it leaves out."""

    names: dict[str, str]
    ours: list[str]
    theirs: list[str]


def propose(state: Mapping[str, Any], leaves: Sequence[Leaf], dialect: Dialect, order: Iterable[str]) -> Proposal:
    """Matches modules whose variables have the same shapes: first those whose names agree, then by order.

    Modules that follow upon alike ones go first: branches may be defined in another order than they run.

    Args:
      state: arrays by name.
      leaves: the variables, with the names that they have without a map.
      dialect: the other library's words.
      order: the modules as they run or are defined, where that is known.
    """
    rank = {module: at for at, module in enumerate(order)}
    ours, theirs = _modules_here(leaves, dialect, rank), _modules_there(state, dialect)
    default = {module.name: module.name.replace("/", dialect.separator) for module in ours}
    names: dict[str, str] = {}
    in_sequence = _is_in_sequence(state, theirs) and all(module.name in rank for module in ours)
    if in_sequence:
        ours, theirs = _following(ours), _following(theirs)
    for signature in (_context, _words, _axes, _sizes)[0 if in_sequence else 1 :]:
        for here, there in _groups(ours, theirs, signature):
            known = all(m.name in rank for m in here) or _are_numbered(m.name for m in here)
            for a, b in _pairs(here, there, default, dialect.separator, by_order=known):
                names[a.name] = b.name
                ours, theirs = _without(ours, a), _without(theirs, b)
    in_order = {leaf.module: names[leaf.module] for leaf in leaves if leaf.module in names}
    return Proposal(in_order, [m.name for m in ours], [m.name for m in theirs])


def advice(found: Proposal, dialect: Dialect) -> str:
    """Returns what an error on names that do not correspond adds to them."""
    if not found.names:
        return "Say in names={...} what the modules are called in it."
    if found.ours or found.theirs:
        return (
            f"By names, shapes and order {len(found.names)} modules of the variables have a counterpart in the state, "
            f"{shortened(found.ours)} have none, and {shortened(found.theirs)} are left of the state. Is it the same "
            "network? Say in names={...} what these are called, or in partial=[...] which may keep their values; "
            "apply_fn= and x= give a linen model's order."
        )
    before = {name.removesuffix(module.replace("/", dialect.separator)) for module, name in found.names.items()}
    if len(before) == 1 and (prefix := before.pop()).endswith(dialect.separator):
        return f"All of it fits with prefix={prefix!r}."
    few = dict(list(found.names.items())[:6])
    if len(few) == len(found.names):
        return f"By names, shapes and order all of it fits with names={few}: check that the outputs agree."
    return (
        f"By names, shapes and order all {len(found.names)} modules fit with names=bnjax.tools.propose_names(state, "
        f"variables, ...), such as {few}: check that the outputs agree."
    )


def _modules_here(leaves: Sequence[Leaf], dialect: Dialect, rank: Mapping[str, int]) -> list[Module]:
    modules: dict[str, dict[str, Shape]] = {}
    for leaf in leaves:
        if leaf.role != "steps":
            word = (dialect.norm if leaf.normalises else dialect.weight)[leaf.role]
            modules.setdefault(leaf.module, {})[word] = leaf.shape
    ordered = sorted(modules, key=lambda name: (rank.get(name, math.inf), natural(name)))
    return [Module(name, modules[name]) for name in ordered]


def _modules_there(state: Mapping[str, Any], dialect: Dialect) -> list[Module]:
    """Returns the modules of a state in its order; files in alphabetical order have 10 before 9."""
    words = sorted({*dialect.norm.values(), *dialect.weight.values()}, key=len, reverse=True)
    counter = dialect.norm.get("steps")
    modules: dict[str, dict[str, Shape]] = {}
    for key, value in state.items():
        word = next((w for w in words if key.endswith(dialect.separator + w)), key.rpartition(dialect.separator)[2])
        name = key.removesuffix(word).removesuffix(dialect.separator).removesuffix("/vars")
        if word != counter:
            modules.setdefault(name, {})[word] = tuple(getattr(value, "shape", ()))
    ordered = sorted(modules, key=natural) if list(state) == sorted(state) else list(modules)
    return [Module(name, part) for name in ordered for part in _parts(modules[name])]


def _parts(shapes: dict[str, Shape]) -> list[dict[str, Shape]]:
    """Returns the variables of a module, those of a separable convolution in two parts: it is two modules in Flax."""
    if not shapes.keys() >= {"depthwise_kernel", "pointwise_kernel"}:
        return [{"kernel" if word == "depthwise_kernel" else word: shape for word, shape in shapes.items()}]
    rest = {word: shape for word, shape in shapes.items() if word not in ("depthwise_kernel", "pointwise_kernel")}
    return [{"kernel": shapes["depthwise_kernel"]}, {"kernel": shapes["pointwise_kernel"], **rest}]


def _groups(
    ours: Sequence[Module], theirs: Sequence[Module], signature: Callable[[Module], Hashable]
) -> Iterator[tuple[list[Module], list[Module]]]:
    """Returns the modules of one signature, here and there."""
    for key in dict.fromkeys(map(signature, ours)):
        yield [m for m in ours if signature(m) == key], [m for m in theirs if signature(m) == key]


def _pairs(
    here: list[Module], there: list[Module], default: Mapping[str, str], separator: str, *, by_order: bool
) -> Iterator[tuple[Module, Module]]:
    """Returns pairs of modules that look the same: by names, where one ends as the other; what is left, by order."""

    def agree(a: Module, b: Module) -> bool:
        one, other = f"{separator}{default[a.name]}", f"{separator}{b.name}"
        return one.endswith(other) or other.endswith(one)

    for a in list(here):
        fitting = [b for b in there if agree(a, b)]
        if len(fitting) == 1 and sum(agree(other, fitting[0]) for other in here) == 1:
            yield a, fitting[0]
            here, there = _without(here, a), _without(there, fitting[0])
    if len(here) == len(there) and (by_order or len(here) == 1):
        numbered = _are_numbered(m.name for m in there)
        yield from zip(here, sorted(there, key=lambda m: natural(m.name)) if numbered else there, strict=True)


def _is_in_sequence(state: Mapping[str, Any], theirs: Sequence[Module]) -> bool:
    """Returns whether a state is in the order of its modules: not sorted by name, and all of a module in one place."""
    names = sorted({module.name for module in theirs}, key=len, reverse=True)
    owners = [next((name for name in names if key.startswith(name)), "") for key in state]
    return list(state) != sorted(state) and len(list(groupby(owners))) == len(set(owners))


def _following(modules: Sequence[Module]) -> list[Module]:
    """Returns the modules, each with what is before it."""
    before = [(), *map(_axes, modules)]
    return [module._replace(before=b) for module, b in zip(modules, before[:-1], strict=True)]


def _without(modules: list[Module], one: Module) -> list[Module]:
    return [m for m in modules if m is not one]


def _dims(shape: Shape) -> Shape:
    return tuple(sorted(n for n in shape if n != 1))


def _context(module: Module) -> Hashable:
    return _words(module), module.before


def _words(module: Module) -> Hashable:
    return frozenset((word, _dims(shape)) for word, shape in module.shapes.items())


def _axes(module: Module) -> Hashable:
    return tuple(sorted(_dims(shape) for shape in module.shapes.values()))


def _sizes(module: Module) -> Hashable:
    return tuple(sorted(math.prod(shape) for shape in module.shapes.values()))


def _are_numbered(names: Iterable[str]) -> bool:
    """Returns whether names differ by their numbers alone, which then say their order."""
    return len({re.sub(r"_?\d+", "", name) for name in names}) <= 1
