"""Where operations that only move elements put the channels: the index of an output, from that of the input."""

from math import prod
from typing import Any

import numpy as np

from bnjax.tools._fold._flow import Flow, Op

Index = np.ndarray[Any, Any]
LARGEST = 2**24  # positions of an index; a reshape that mixes rows and channels would need one for each


def reshaped(op: Op, index: Index, flow: Flow) -> Index | None:
    old, new = flow.shapes[op.inputs[0]], flow.shapes[op.outputs[0]]
    before: list[int] = []
    after: list[int] = []
    i = j = 0
    if 0 in old:
        return None
    while i < len(old) or j < len(new):  # dimensions that are split or merged among themselves
        m, n = i + (i < len(old)), j + (j < len(new))
        while prod(old[i:m]) != prod(new[j:n]):
            if prod(old[i:m]) < prod(new[j:n]):
                m += 1
            else:
                n += 1
        varies = max(index.shape[i:m], default=1) > 1
        before += old[i:m] if varies else [1] * (m - i)
        after += new[j:n] if varies else [1] * (n - j)
        i, j = m, n
    return compressed(np.broadcast_to(index, before).reshape(after)) if prod(before) <= LARGEST else None


def compressed(index: Index) -> Index:
    """Returns the index with size 1 along axes where nothing changes."""
    for axis in range(index.ndim):
        first = index.take([0], axis)
        index = first if np.all(index == first) else index
    return index


def broadcast(op: Op, index: Index, flow: Flow) -> Index:
    shape = [1] * len(flow.shapes[op.outputs[0]])
    for axis, size in zip(op.eqn.params["broadcast_dimensions"], index.shape, strict=True):
        shape[axis] = size
    return index.reshape(shape)


def sliced(op: Op, index: Index, flow: Flow) -> Index:
    start, limit = op.eqn.params["start_indices"], op.eqn.params["limit_indices"]
    steps = op.eqn.params["strides"] or (1,) * index.ndim
    ranges = zip(start, limit, steps, strict=True)
    return index[tuple(slice(None) if n == 1 else slice(*r) for n, r in zip(index.shape, ranges, strict=True))]


def sliced_somewhere(op: Op, index: Index, flow: Flow) -> Index | None:
    old, new = flow.shapes[op.inputs[0]], flow.shapes[op.outputs[0]]
    return index if all(n == 1 or a == b for n, a, b in zip(index.shape, old, new, strict=True)) else None


def transposed(op: Op, index: Index, flow: Flow) -> Index:
    return index.transpose(op.eqn.params["permutation"])


def reversed(op: Op, index: Index, flow: Flow) -> Index:
    return np.flip(index, op.eqn.params["dimensions"])
