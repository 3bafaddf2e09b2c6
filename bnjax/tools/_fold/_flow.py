"""The flow of data through a traced program: what makes each value, and what uses it.

Calls (jit, remat, custom derivatives) are read through, as if their bodies stood in their place. Bodies of loops,
branches and shard_map are read too: what enters one unchanged (weights, say) is followed into it by an operation
`argument`; what a loop carries comes from nowhere, and the results of a body are used.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_CALLS = (
    *("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"),
    *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"),
)
ARGUMENT = "argument"  # what enters a body, seen from inside
RESULT = "result"  # of the program, or of a body


class Op(NamedTuple):
    """One operation; values are numbered."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    at: int  # position in the program
    eqn: Any = None  # the equation of the jaxpr, for its parameters
    caller: Any = None  # the equation that called a function of JAX in which this stands, else eqn
    called: str = ""  # the name of that function

    @property
    def label(self) -> str:
        """Returns what `checkpoint_name` was given, or nothing."""
        return str(self.eqn.params["name"]) if self.name == "name" else ""


class Flow(NamedTuple):
    """The operations of a program.

    Attributes:
      ops: all of them, in order.
      live: the positions of those that results depend on.
      maker: the operation that makes a value.
      users: the live operations that use a value, with one of name `result` where it is a result.
      marks: the operations of `checkpoint_name`, by label; the same label may stand in a program several times.
      shapes: of each value.
      constants: the numbers that are known before the program runs.
    """

    ops: list[Op]
    live: set[int]
    maker: dict[int, Op]
    users: dict[int, list[Op]]
    marks: dict[str, list[Op]]
    shapes: dict[int, tuple[int, ...]]
    constants: dict[int, complex]


def flow_of(closed: Any) -> Flow:
    """Returns the flow of a closed jaxpr, whose arguments are the values 0, 1, 2, ..."""
    reader = _Reader()
    results = reader.read(closed.jaxpr, [reader.new(v.aval) for v in closed.jaxpr.invars])
    reader.add(RESULT, tuple(results), ())
    used: set[int] = set()
    live: set[int] = set()
    for op in reversed(reader.ops):  # each stands after those that make its inputs
        if op.name == RESULT or used & set(op.outputs):
            used |= set(op.inputs)
            live.add(op.at)
    users: dict[int, list[Op]] = {}
    marks: dict[str, list[Op]] = {}
    for op in reader.ops:
        for value in dict.fromkeys(op.inputs) if op.at in live else ():
            users.setdefault(value, []).append(op)
        if op.label:
            marks.setdefault(op.label, []).append(op)
    maker = {value: op for op in reader.ops for value in op.outputs}
    return Flow(reader.ops, live, maker, users, marks, reader.shapes, reader.constants)


class _Reader:
    """Numbers the values of a jaxpr and of all the jaxprs in it."""

    def __init__(self) -> None:
        self.fresh = itertools.count()
        self.ops: list[Op] = []
        self.shapes: dict[int, tuple[int, ...]] = {}
        self.constants: dict[int, complex] = {}

    def new(self, aval: Any) -> int:
        """Returns the number of one more value."""
        value = next(self.fresh)
        self.shapes[value] = tuple(getattr(aval, "shape", ()))
        return value

    def add(self, name: str, inputs: tuple[int, ...], outputs: tuple[int, ...], *more: Any) -> None:
        """Appends an operation."""
        self.ops.append(Op(name, inputs, outputs, len(self.ops), *more))

    def read(self, jaxpr: Any, arguments: list[int], caller: Any = None, called: str = "") -> list[int]:
        """Appends the operations of a jaxpr; returns the numbers of its results."""
        numbers = dict(zip(jaxpr.invars, arguments, strict=True))

        def number(atom: Any) -> int:
            if hasattr(atom, "val"):  # a literal
                value = self.new(atom.aval)
                if not jnp.shape(atom.val) and jnp.issubdtype(jnp.result_type(atom.val), jnp.number):
                    self.constants[value] = complex(atom.val)
                return value
            if atom not in numbers:
                numbers[atom] = self.new(atom.aval)
            return numbers[atom]

        for eqn in jaxpr.eqns:
            inputs, name = [number(atom) for atom in eqn.invars], eqn.primitive.name
            bodies = [body for _, body in _jaxprs(eqn.params)]
            if name in _CALLS and len(bodies) >= 1 and len(bodies[0].invars) == len(inputs):
                known = called or _of_jax(str(eqn.params.get("name", "")))
                results = self.read(bodies[0], inputs, caller or (eqn if known else None), known)
                numbers.update(zip(eqn.outvars, results, strict=True))
                continue
            outside = self._read_bodies(eqn, inputs)
            outputs = tuple(number(atom) for atom in eqn.outvars)
            if name in ("convert_element_type", "broadcast_in_dim", "copy") and inputs[0] in self.constants:
                self.constants[outputs[0]] = self.constants[inputs[0]]
            self.add(name, tuple(outside), outputs, eqn, caller or eqn, called)
        return [number(atom) for atom in jaxpr.outvars]

    def _read_bodies(self, eqn: Any, inputs: list[int]) -> list[int]:
        """Reads what runs inside of an operation; returns the inputs that it uses in another way."""
        outside = set(range(len(inputs)))
        for key, body in _jaxprs(eqn.params):
            within = [self.new(v.aval) for v in body.invars]
            for i, j in _unchanged(eqn, key, body):
                outside.discard(i)
                self.add(ARGUMENT, (inputs[i],), (within[j],), eqn, eqn)
            self.add(RESULT, tuple(self.read(body, within)), (), eqn, eqn)
        return [inputs[i] for i in sorted(outside)]


def _unchanged(eqn: Any, key: str, body: Any) -> Iterator[tuple[int, int]]:
    """Yields which operand of an operation is which argument of a body: every one that no iteration changes."""
    name, there = eqn.primitive.name, len(body.invars)
    if name == "cond":
        yield from ((i + 1, i) for i in range(there))
    elif name == "shard_map":
        yield from ((i, i) for i in range(there))
    elif name == "while":
        first = 0 if key == "cond_jaxpr" else eqn.params["cond_nconsts"]
        yield from ((first + i, i) for i in range(eqn.params[key.replace("jaxpr", "nconsts")]))
    elif name == "scan":
        # Constants, carries and slices, in this order; how many there are of each, the shapes say in every JAX.
        slices = sum(_ndim(a) != _ndim(b) for a, b in zip(eqn.invars, body.invars, strict=True))
        stacked = sum(_ndim(a) != _ndim(b) for a, b in zip(eqn.outvars, body.outvars, strict=True))
        carries = len(eqn.outvars) - stacked
        constants = there - carries - slices
        yield from ((i, i) for i in range(there) if i < constants or i >= constants + carries)


def _ndim(atom: Any) -> int:
    return len(getattr(atom.aval, "shape", ()))


def _jaxprs(params: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Returns the jaxprs among the parameters of an operation, opened, with their names."""
    for key, value in params.items():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(item, "eqns"):
                yield key, getattr(item, "jaxpr", item)


def _of_jax(name: str) -> str:
    """Returns the public name of a function of JAX, or nothing for any other function."""
    name = name.strip("_")
    return name if hasattr(jax.nn, name) or hasattr(jnp, name) else ""
