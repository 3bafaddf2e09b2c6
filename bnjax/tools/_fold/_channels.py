"""What operations do to y = a·x + c per channel: which of them can stand between a normalization and a layer.

An operation L passes if L(a·x + c) = a·L(x) + f·c with a known number f, channel by channel: shapes change, positions
are summed or averaged; the largest of them taken, if a is not negative.
"""

from collections.abc import Callable, Mapping
from math import inf, prod
from typing import NamedTuple

import numpy as np
from jax import numpy as jnp

from bnjax.tools._fold import _moves
from bnjax.tools._fold._flow import Flow, Op
from bnjax.tools._fold._moves import Index
from bnjax.tools._fold._names import name_of


class Channels(NamedTuple):
    """Where the channels of a value are, and what became of a constant.

    Attributes:
      at: the channel at each position, of the rank of the value; of size 1 along axes where it stays the same.
      factor: a constant c per channel at the start is factor·c here; 0 where none was there yet.
      ordered: a largest or smallest value was taken: right for a ≥ 0 alone.
      uneven: the operation behind which the constant is not the same at all positions, such as `pad`; or nothing.
    """

    at: Index
    factor: float = 1.0
    ordered: bool = False
    uneven: str = ""

    def along(self, axis: int) -> Index | None:
        """Returns the channels along one axis, if they change along no other."""
        return self.at.reshape(-1) if self.at.size == self.at.shape[axis] else None


def channels_at(axis: int, size: int, rank: int, factor: float = 1.0) -> Channels:
    """Returns the channels 0, 1, ... along an axis of a value."""
    shape = [1] * rank
    shape[axis] = size
    return Channels(np.arange(size).reshape(shape), factor)


def behind(op: Op, known: Mapping[int, Channels], flow: Flow) -> Channels | None:
    """Returns the channels of the output of an operation, some inputs being known; None where it does not pass."""
    rule = _RULES.get(op.name)
    if rule is None or len(op.outputs) != 1:
        return None
    return rule(op, [known.get(value) for value in op.inputs], flow)


Inputs = list[Channels | None]
Rule = Callable[[Op, Inputs, Flow], Channels | None]


def _same(op: Op, inputs: Inputs, flow: Flow) -> Channels | None:
    return inputs[0]


def _converted(op: Op, inputs: Inputs, flow: Flow) -> Channels | None:
    return inputs[0] if jnp.issubdtype(op.eqn.outvars[0].aval.dtype, jnp.inexact) else None  # integers are rounded


def _moved(change: Callable[[Op, Index, Flow], Index | None]) -> Rule:
    """Returns the rule of an operation that only puts the first input's elements elsewhere."""

    def rule(op: Op, inputs: Inputs, flow: Flow) -> Channels | None:
        if inputs[0] is None or any(more is not None for more in inputs[1:]):
            return None
        index = change(op, inputs[0].at, flow)
        return None if index is None else inputs[0]._replace(at=index)

    return rule


def _concatenated(op: Op, inputs: Inputs, flow: Flow) -> Channels | None:
    parts = [part for part in inputs if part is not None]
    axis = op.eqn.params["dimension"]
    if len(parts) < len(inputs) or any(part[1:] != parts[0][1:] for part in parts):
        return None
    sizes = np.array([part.at.shape for part in parts]).max(0)  # where any of them varies, all are written out
    wide = []
    for part, value in zip(parts, op.inputs, strict=True):
        sizes[axis] = flow.shapes[value][axis]
        if prod(sizes) > _moves.LARGEST:
            return None
        wide.append(np.broadcast_to(part.at, sizes))
    return parts[0]._replace(at=_moves.compressed(np.concatenate(wide, axis)))


def _padded(op: Op, inputs: Inputs, flow: Flow) -> Channels | None:
    config, padded = op.eqn.params["padding_config"], inputs[0]
    if padded is None or any(n > 1 and any(pads) for n, pads in zip(padded.at.shape, config, strict=True)):
        return None
    if all(low <= 0 and high <= 0 and within == 0 for low, high, within in config):
        return padded
    if flow.constants.get(op.inputs[1]) != 0:
        return None
    return _unevenly(op, padded)


def _reduced(op: Op, inputs: Inputs, flow: Flow) -> Channels | None:
    x, axes = inputs[0], op.eqn.params["axes"]
    if x is None or any(x.at.shape[axis] > 1 for axis in axes):
        return None
    count = prod(flow.shapes[op.inputs[0]][axis] for axis in axes)
    return _over(op, x._replace(at=x.at.squeeze(tuple(axes))), count)


def _pooled(op: Op, inputs: Inputs, flow: Flow) -> Channels | None:
    x, p = inputs[0], op.eqn.params
    window, steps, pads, within = (
        np.array(p[name]) for name in ("window_dimensions", "window_strides", "padding", "base_dilation")
    )
    moves = (window > 1) | (steps > 1) | (within > 1) | pads.any(1)
    if x is None or np.any(moves & (np.array(x.at.shape) > 1)):
        return None
    zeros = op.name == "reduce_window_sum" and (pads.any() or (within > 1).any())
    return _over(op, _unevenly(op, x) if zeros else x, int(window.prod()))


def _over(op: Op, x: Channels, count: int) -> Channels:
    """Returns the channels of the sum of so many positions, or of the largest or smallest of them."""
    return x._replace(factor=x.factor * count) if op.name.endswith("sum") else x._replace(ordered=True)


def _scaled(op: Op, inputs: Inputs, flow: Flow) -> Channels | None:
    """Times or over something else, which may differ from position to position if no constant is there yet."""
    at = 0 if inputs[0] is not None else 1
    x, other = inputs[at], inputs[1 - at]
    if x is None or other is not None or (op.name == "div" and at):
        return None
    number = flow.constants.get(op.inputs[1 - at])
    if number is None or number.imag or number.real in (0, inf, -inf):
        return _unevenly(op, x)
    return x._replace(factor=x.factor / number.real if op.name == "div" else x.factor * number.real)


def _unevenly(op: Op, x: Channels) -> Channels:
    """Returns the channels behind an operation that leaves 0 as it is, and no other constant."""
    return x._replace(uneven=x.uneven or name_of(op)) if x.factor else x


def _added(op: Op, inputs: Inputs, flow: Flow) -> Channels | None:
    """Returns the channels of the sum of two values that have the same channels at the same places."""
    x, y = inputs
    if x is None or y is None or not np.array_equal(x.at, y.at):
        return None
    return Channels(x.at, x.factor + y.factor, x.ordered or y.ordered, x.uneven or y.uneven)


# What moves, copies or places a value; also all that may happen to a weight between its variable and a layer.
SAME = ("name", "copy", "copy_p", "sharding_constraint", "reshard", "pvary", "pcast", "layout_constraint")
_RULES: dict[str, Rule] = {
    **dict.fromkeys(SAME, _same),
    "convert_element_type": _converted,
    **dict.fromkeys(("reshape", "squeeze"), _moved(_moves.reshaped)),
    "broadcast_in_dim": _moved(_moves.broadcast),
    "transpose": _moved(_moves.transposed),
    "rev": _moved(_moves.reversed),
    "slice": _moved(_moves.sliced),
    "dynamic_slice": _moved(_moves.sliced_somewhere),
    "concatenate": _concatenated,
    "pad": _padded,
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min"), _reduced),
    **dict.fromkeys(("reduce_window_sum", "reduce_window_max", "reduce_window_min"), _pooled),
    **dict.fromkeys(("mul", "div"), _scaled),
    **dict.fromkeys(("add", "add_any"), _added),
}
