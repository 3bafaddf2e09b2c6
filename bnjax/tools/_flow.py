"""The flow of data through a traced program: what makes each value, and what uses it.

Calls (jit, remat, custom derivatives) are read through, as if their bodies stood in their place. Bodies of loops and
branches are read too, each by itself: their arguments come from nowhere and their results are used.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

_CALLS = ("jit", "pjit", "closed_call", "core_call", "remat2", "remat", "checkpoint", "custom_jvp_call")
_SAME_VALUE = ("name", "convert_element_type", "copy", "copy_p", "sharding_constraint", "optimization_barrier")


class Op(NamedTuple):
    """One operation; values are numbered."""

    name: str
    label: str  # of a `checkpoint_name`, else empty
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class Flow(NamedTuple):
    """The operations that the results depend on."""

    ops: list[Op]
    maker: dict[int, Op]
    users: dict[int, list[str]]  # labels or names of the operations, or "the output"
    marks: dict[str, Op]  # by label

    def origin(self, value: int, marks: tuple[str, ...]) -> tuple[str, str]:
        """Where a value comes from, through casts and the like, as long as nothing else uses it on the way.

        Returns the label of one of `marks` and "", or "" and the reason why there is none.
        """
        while True:
            others = self.users.get(value, [])
            if len(others) > 1:
                return "", f"used by something else as well: {', '.join(sorted(others))}"
            op = self.maker.get(value)
            if op is None:
                return "", "an argument of the model, or of the loop around it"
            if op.label in marks:
                return op.label, ""
            if op.name not in _SAME_VALUE or len(op.inputs) != 1:
                return "", f"made by {op.name}"
            value = op.inputs[0]


def flow_of(closed: Any) -> Flow:
    """The flow of a closed jaxpr."""
    reader = _Reader()
    results = reader.read(closed.jaxpr, [next(reader.fresh) for _ in closed.jaxpr.invars])
    used = set(results) | reader.results
    ops = []
    for op in reversed(reader.ops):  # each operation stands after those that make its inputs
        if used & set(op.outputs):
            used |= set(op.inputs)
            ops.append(op)
    users: dict[int, list[str]] = {}
    for value in [*results, *reader.results]:
        users.setdefault(value, []).append("the output")
    for op in ops:
        for value in op.inputs:
            users.setdefault(value, []).append(op.label or op.name)
    maker = {value: op for op in ops for value in op.outputs}
    return Flow(ops, maker, users, {op.label: op for op in ops if op.label})


class _Reader:
    """Numbers the values of a jaxpr and of all the jaxprs in it."""

    def __init__(self) -> None:
        self.fresh = itertools.count()
        self.ops: list[Op] = []
        self.results: set[int] = set()  # of the bodies of loops and branches

    def read(self, jaxpr: Any, arguments: list[int]) -> list[int]:
        """Appends the operations of a jaxpr; returns the numbers of its results."""
        numbers = dict(zip(jaxpr.invars, arguments, strict=True))

        def number(atom: Any) -> int:
            if hasattr(atom, "val"):  # a literal
                return next(self.fresh)
            if atom not in numbers:
                numbers[atom] = next(self.fresh)
            return numbers[atom]

        for eqn in jaxpr.eqns:
            inputs = [number(atom) for atom in eqn.invars]
            bodies = list(_jaxprs(eqn.params))
            if eqn.primitive.name in _CALLS and len(bodies) == 1 and len(bodies[0].invars) == len(inputs):
                results = self.read(bodies[0], inputs)
                numbers.update(zip(eqn.outvars, results, strict=True))
                continue
            for body in bodies:
                self.results.update(self.read(body, [next(self.fresh) for _ in body.invars]))
            label = str(eqn.params.get("name", "")) if eqn.primitive.name == "name" else ""
            outputs = tuple(number(atom) for atom in eqn.outvars)
            self.ops.append(Op(eqn.primitive.name, label, tuple(inputs), outputs))
        return [number(atom) for atom in jaxpr.outvars]


def _jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs among the parameters of an operation, opened."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(item, "eqns"):
                yield getattr(item, "jaxpr", item)
