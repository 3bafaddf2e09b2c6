"""Whether a convolution or dense layer is linear in its input and in the kernel that it stores, as it was traced."""

from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax import lax

from bnjax.tools import _trees
from bnjax.tools._fold._channels import Channels, channels_at
from bnjax.tools._fold._flow import RESULT, Flow, Op, flow_of
from bnjax.tools._fold._names import name_of
from bnjax.tools._fold._sweep import End, sweep
from bnjax.tools._layers import Call, no_handling, own_class

_PRODUCTS = ("conv_general_dilated", "dot_general")
_PADS = "pads with zeros, which are not shifted"


class Linear(NamedTuple):
    """What folding has to know of a layer.

    Attributes:
      rank: of the kernel, without axes that vmap or scan put before.
      out_axis: of the kernel, from the end; the inputs are along the other one of the last two.
      groups: of channels.
      after: why no normalization can be folded into it from after it, or nothing.
      before: why none can from before it, or nothing.
      coarse: whether its product asks for less precision than its dtype has, which a CPU does not heed.
    """

    rank: int
    out_axis: int
    groups: int = 1
    after: str = ""
    before: str = ""
    coarse: bool = False


def read_linear(call: Call) -> Linear:
    """Reads a layer by tracing it alone: as it is inside of vmap and scan, with whatever products it was given."""
    closed, leaves = _traced(call)
    flow = flow_of(closed)
    kernel, x = leaves.index(("kernel",)), len(leaves)
    shape, out_axis = flow.shapes[kernel], -2 if getattr(call.module, "transpose_kernel", False) else -1
    layer = Linear(len(shape), out_axis)
    outs, ins = (_product(flow, kernel, channels_at(a, shape[a], len(shape))) for a in (out_axis, -3 - out_axis))
    if isinstance(outs, str) or isinstance(ins, str):
        why = next(end for end in (outs, ins) if isinstance(end, str))
        return layer._replace(after=why, before=why)
    product = _Product.of(outs.op, flow)
    if product is None or not (product.holds(outs, product.outputs) and product.holds(ins, product.inputs)):
        why = "multiplies by its kernel in another way than convolutions and dense layers do"
        return layer._replace(after=why, before=why)
    after = _after(flow, product, leaves.index(("bias",)) if ("bias",) in leaves else None)
    changed = f"changes its kernel ({ins.channels.uneven})" if ins.channels.uneven else ""
    precision = {*np.atleast_1d(product.op.eqn.params["precision"])}
    return layer._replace(
        groups=product.groups,
        after=after,
        before=after or changed or _before(flow, product, x),
        coarse=not precision <= {None, lax.Precision.HIGHEST},
    )


def _traced(call: Call) -> tuple[Any, list[tuple[str, ...]]]:
    """Returns the jaxpr of one call of a layer, and the names of its variables, which are its first arguments."""
    module: Any = call.module
    if isinstance(module, nnx.Module):
        graph, variables = nnx.split(module)
        method: Any = own_class(module).__call__
        run = lambda variables, x: method(nnx.merge(graph, variables), x, *call.rest, **call.options)  # noqa: E731
    else:
        alone, variables = module.clone(parent=None, name=None), module.variables
        run = lambda variables, x: alone.apply(variables, x, *call.rest, **call.options)  # noqa: E731
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (variables, call.x))
    with no_handling():
        return jax.make_jaxpr(run)(*shapes), _trees.flatten(shapes[0]).names


class _Product(NamedTuple):
    """The operation that multiplies input and kernel, and the axes of its operands."""

    op: Op
    input: int  # the channels of its first operand
    outputs: int  # of its second, the kernel
    inputs: int
    result: int  # of its output
    groups: int

    @classmethod
    def of(cls, op: Op, flow: Flow) -> "_Product | None":
        if op.name == "conv_general_dilated":
            lhs, rhs, out = op.eqn.params["dimension_numbers"]
            if op.eqn.params["batch_group_count"] != 1:
                return None
            return cls(op, lhs[1], rhs[0], rhs[1], out[1], op.eqn.params["feature_group_count"])
        (lhs, rhs), batch = op.eqn.params["dimension_numbers"]
        if any(batch) or len(lhs) != 1 or len(flow.shapes[op.inputs[1]]) != 2:
            return None
        return cls(op, lhs[0], 1 - rhs[0], rhs[0], len(flow.shapes[op.outputs[0]]) - 1, 1)

    def holds(self, end: End, axis: int) -> bool:
        """Returns whether a sweep ended here in the kernel, with its channels along this axis of it."""
        return end.op == self.op and end.operand == 1 and _as_they_were(end.channels, axis)


def _as_they_were(channels: Channels, axis: int) -> bool:
    """Returns whether all channels are there, in their order."""
    along = channels.along(axis)
    return along is not None and np.array_equal(along, np.arange(along.size))


def _product(flow: Flow, kernel: int, channels: Channels) -> End | str:
    """Returns where the kernel ends; or why it does not reach a product as it is stored."""
    ends = sweep(flow, {kernel: channels}, lambda op: op.name in _PRODUCTS)
    if len(ends) == 1 and ends[0].wanted and not ends[0].channels.ordered:
        return ends[0]
    others = [name_of(end.op) for end in ends if not end.wanted] or ["several products"]
    return f"does more to its kernel than multiply by it ({others[0]})"


def _after(flow: Flow, product: _Product, bias: int | None) -> str:
    """Returns why outputs cannot be scaled and shifted by kernel and bias, or nothing."""
    shape = flow.shapes[product.op.outputs[0]]
    starts = {product.op.outputs[0]: channels_at(product.result, shape[product.result], len(shape), factor=0.0)}
    if bias is not None:
        starts[bias] = channels_at(0, shape[product.result], 1)
    ends = sweep(flow, starts, lambda op: op.name == RESULT)
    if len(ends) != 1 or not ends[0].wanted:
        return (
            f"does more to its product than add a bias ({name_of(ends[0].op)})" if ends else "does not use its kernel"
        )
    channels = ends[0].channels
    exact = not channels.uneven and not channels.ordered and channels.factor == (bias is not None)
    return "" if exact and _as_they_were(channels, -1) else "does more to its product than add a bias"


def _before(flow: Flow, product: _Product, x: int) -> str:
    """Returns why inputs cannot be scaled and shifted by kernel and bias, or nothing."""
    shape = flow.shapes[x]
    ends = sweep(flow, {x: channels_at(-1, shape[-1], len(shape))}, lambda op: op == product.op)
    if len(ends) != 1 or not ends[0].wanted or ends[0].operand != 0:
        return f"does more to its input than multiply it by its kernel ({name_of(ends[0].op)})"
    channels, params = ends[0].channels, product.op.eqn.params
    if channels.uneven:
        return _PADS if channels.uneven == "pad" else f"does more to its input ({channels.uneven})"
    if product.op.name == "conv_general_dilated":
        if set(params["lhs_dilation"]) != {1}:
            return "puts zeros between the positions of its input"
        if np.any(params["padding"]):
            return _PADS
    exact = channels.factor == 1 and not channels.ordered and _as_they_were(channels, product.input)
    return "" if exact else "does more to its input than multiply it by its kernel"
