"""Following channels forward through a program, to every operation that uses them."""

import heapq
from collections.abc import Callable, Mapping
from typing import NamedTuple

from bnjax.tools._fold._channels import SAME, Channels, behind
from bnjax.tools._fold._flow import RESULT, Flow, Op


class End(NamedTuple):
    """An operation in which a sweep ends: the one that was looked for, or one that channels do not pass.

    Attributes:
      op: the operation.
      operand: which of its inputs the channels are.
      channels: where they are in that input, and what became of a constant.
      wanted: whether it was looked for.
    """

    op: Op
    operand: int
    channels: Channels
    wanted: bool


Pass = Callable[[Op, Mapping[int, Channels], Flow], Channels | None]


def unmoved(op: Op, known: Mapping[int, Channels], flow: Flow) -> Channels | None:
    """Returns the channels behind an operation that leaves every element where it is."""
    return behind(op, known, flow) if op.name in (*SAME, "convert_element_type") else None


def sweep(flow: Flow, starts: Mapping[int, Channels], wanted: Callable[[Op], bool], passes: Pass = behind) -> list[End]:
    """Returns all ends of the ways from some values, in the order of the program.

    Args:
      flow: the program.
      starts: the values, and the channels in each.
      wanted: whether an operation is looked for. Results of the program end a way as well.
      passes: which operations the channels pass, and where they are behind them.
    """
    known, ends = dict(starts), []
    queue = sorted({op.at for value in starts for op in flow.users.get(value, [])})
    done: set[int] = set()
    while queue:
        op = flow.ops[heapq.heappop(queue)]
        if op.at in done:
            continue
        done.add(op.at)
        after = None if wanted(op) or op.name == RESULT else passes(op, known, flow)
        if after is None:
            operands = [(i, known[value]) for i, value in enumerate(op.inputs) if value in known]
            ends += [End(op, i, channels, wanted(op)) for i, channels in operands]
            continue
        known[op.outputs[0]] = after
        for user in flow.users.get(op.outputs[0], []):
            heapq.heappush(queue, user.at)
    return ends
