"""What a compiled program says of itself: the bytes that its operations move, and its collectives.

Two things are kept apart, for they differ in what they cost: the main program, which every step runs, and the branches
of its conditionals, which a steady state does not (the guard of `bnjax.batch_moments`).
"""

import re
from typing import Any, NamedTuple

_SIZES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64", "c64"), 8),
}
# Views, arguments, and the ends of what was counted at its start.
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "partition-id", "replica-id"}
_FREE |= {"copy-done", "slice-done", "all-reduce-done", "async-done", "async-update"}
_CALLS = {"call", "conditional", "while"}  # what they call is counted, not what they are given
_ON_CHIP = re.compile(r"S\([1-9]\d*\)")  # the memory space of a layout, where it is not HBM


class Operation(NamedTuple):
    """One line of a computation."""

    name: str
    type: str
    opcode: str
    operands: list[str]
    calls: list[str]


Computations = dict[str, list[Operation]]


def computations(text: str) -> tuple[Computations, str]:
    """The computations of an HLO module by name, and the name of the entry."""
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
    names = re.findall(r"(?:true_computation|false_computation|to_apply|body)=%?([\w.\-]+)", rest)
    for group in re.findall(r"branch_computations=\{([^}]*)\}", rest):
        names += [name.strip().lstrip("%") for name in group.split(",")]
    return names


def size(types: str) -> int:
    """Bytes of the arrays in a type that lie in main memory."""
    total = 0
    for dtype, dims, layout in re.findall(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?", types):
        if dtype in _SIZES and not _ON_CHIP.search(layout):
            total += _SIZES[dtype] * _product(dims)
    return total


def elements(payload: str) -> int:
    """How many numbers a type such as 'f32[2,4]{1,0}' or '(f32[4], f32[4])' holds."""
    return sum(_product(dims) for dims in re.findall(r"\w+\[([\d,]*)\]", payload))


def _product(dims: str) -> int:
    total = 1
    for d in filter(None, dims.split(",")):
        total *= int(d)
    return total


def traffic(text: str) -> tuple[int, int]:
    """Bytes read and written: by the main program, and by the branches of its conditionals, each at its most."""
    found, entry = computations(text)
    branches = 0

    def moved(name: str) -> int:
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
    """What an operation reads: its operands, but of a slice that begins no more than the slice."""
    read = sum(size(types.get(operand, "")) for operand in op.operands)
    return min(read, size(_target(op).split("{")[0])) if op.opcode == "slice-start" else read


def _written(op: Operation) -> int:
    return size(_target(op) if op.opcode in ("copy-start", "slice-start") else op.type)


def _target(op: Operation) -> str:
    """The array that a transfer fills: of (target, source, state), and of ((source), target, state)."""
    arrays = re.findall(r"\w+\[[\d,]*\](?:\{[^}]*\})?", op.type)
    return arrays[1 if op.opcode == "slice-start" else 0]


def all_reduces(compiled: Any) -> tuple[list[str], dict[str, list[str]]]:
    """Payload types of the all-reduces, as (in the main program, {branch of a conditional: [...]})."""
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
