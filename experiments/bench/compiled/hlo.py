"""Parses the text of a compiled program: the bytes that its operations move, and its collectives.

The main program, which every step runs, is counted apart from the branches of its conditionals, which training usually
does not run (the guard of `bnjax.batch_moments`).
"""

import re
from typing import Any, NamedTuple

_SIZES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64", "c64"), 8),
}
# Views and arguments move nothing, and an asynchronous operation is counted at its start, not at its end.
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "partition-id", "replica-id"}
_FREE |= {"copy-done", "slice-done", "all-reduce-done", "async-done", "async-update"}
_CALLS = {"call", "conditional", "while"}  # the computations they call are counted, not their operands
_ON_CHIP = re.compile(r"S\([1-9]\d*\)")  # a memory space in a layout other than 0, which is main memory


class Operation(NamedTuple):
    """One line of a computation."""

    name: str
    type: str
    opcode: str
    operands: list[str]
    calls: list[str]


Computations = dict[str, list[Operation]]


def computations(text: str) -> tuple[Computations, str]:
    """Parses an HLO module into its computations by name; returns them, and the name of the entry computation."""
    found: Computations = {}
    entry = here = ""
    for line in text.splitlines():
        if start := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            here = start.group(2)
            entry = here if start.group(1) else entry
            found[here] = []
        elif parts := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)", line):
            name, kind, opcode, rest = parts.groups()
            operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
            found[here].append(Operation(name, kind, opcode, operands, _called(rest)))
    return found, entry


def _called(rest: str) -> list[str]:
    """Returns the names of the computations that an operation calls."""
    names = re.findall(r"(?:true_computation|false_computation|to_apply|body)=%?([\w.\-]+)", rest)
    for group in re.findall(r"branch_computations=\{([^}]*)\}", rest):
        names += [name.strip().lstrip("%") for name in group.split(",")]
    return names


def size(types: str) -> int:
    """Returns the bytes of those arrays of a type that lie in main memory."""
    total = 0
    for dtype, dims, layout in re.findall(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?", types):
        if dtype in _SIZES and not _ON_CHIP.search(layout):
            total += _SIZES[dtype] * _product(dims)
    return total


def payload(types: str) -> int:
    """Returns the bytes of all arrays of a type, wherever they lie."""
    return size(re.sub(r"\{[^{}]*\}", "", types))


def elements(payload: str) -> int:
    """Returns how many numbers a type such as 'f32[2,4]{1,0}' or '(f32[4], f32[4])' holds."""
    return sum(_product(dims) for dims in re.findall(r"\w+\[([\d,]*)\]", payload))


def _product(dims: str) -> int:
    """Returns the product of dimensions written as "2,4"; 1 for an empty string."""
    total = 1
    for d in filter(None, dims.split(",")):
        total *= int(d)
    return total


def traffic(text: str) -> tuple[int, int]:
    """Counts bytes read and written: of the main program, and of the largest branch of each conditional."""
    found, entry = computations(text)
    branches = 0

    def moved(name: str) -> int:
        """Returns the bytes that a computation and those it calls move."""
        nonlocal branches
        types = {op.name: op.type for op in found[name]}
        total = 0
        for op in found[name]:
            if op.opcode == "conditional":
                branches += max(map(moved, op.calls))
            elif op.opcode in _CALLS:
                total += sum(map(moved, op.calls))
            elif op.opcode not in _FREE:
                total += _read(op, types) + _written(op)
        return total

    return moved(entry), branches


def _read(op: Operation, types: dict[str, str]) -> int:
    """Returns the bytes an operation reads: its operands, or only the slice if the operation starts a slice."""
    read = sum(size(types.get(operand, "")) for operand in op.operands)
    return min(read, size(_target(op).split("{")[0])) if op.opcode == "slice-start" else read


def _written(op: Operation) -> int:
    """Returns the bytes an operation writes."""
    return size(_target(op) if op.opcode in ("copy-start", "slice-start") else op.type)


def _target(op: Operation) -> str:
    """Returns the type of the array that a transfer fills: of (target, source, state), or of ((source),
    target, state).
    """
    arrays = re.findall(r"\w+\[[\d,]*\](?:\{[^}]*\})?", op.type)
    return arrays[1 if op.opcode == "slice-start" else 0]


def all_reduces(compiled: Any) -> tuple[list[str], dict[str, list[str]]]:
    """Returns the payload types of the all-reduces: those of the main program, and by branch those of conditionals."""
    found, _ = computations(compiled if isinstance(compiled, str) else compiled.as_text())
    branches = {name for ops in found.values() for op in ops if op.opcode == "conditional" for name in op.calls}
    main: list[str] = []
    rare: dict[str, list[str]] = {}
    for name, ops in found.items():
        payloads = [op.type for op in ops if op.opcode in ("all-reduce", "all-reduce-start")]
        if name not in branches:
            main += payloads
        elif payloads:
            rare[name] = payloads
    return main, rare
