"""One network of independent branches, so that one fold answers for a whole table of them.

A branch is a row of a table: a function of its input that makes its layers as it goes (linen), or a function of `rngs`
that returns the layers to run one after another (nnx), and the shape of its input.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from tests.support import zoo


class Branch(nn.Module):
    """One branch in linen, whose layers are named as Flax does."""

    run: Callable[[Any], Any]

    @nn.compact
    def __call__(self, x):
        return self.run(x)


class Branches(nn.Module):
    """Every branch of a table in linen, each on its own input."""

    table: Any  # name -> function of x

    @nn.compact
    def __call__(self, x):
        return {name: Branch(run, name=name)(x[name]) for name, run in self.table.items()}


class NnxBranches(nnx.Module):
    """Every branch of a table in nnx, each on its own input."""

    def __init__(self, table, rngs):
        self.branches = nnx.Dict({name: nnx.Sequential(*make(rngs)) for name, make in table.items()})

    def __call__(self, x):
        return {name: branch(x[name]) for name, branch in self.branches.items()}


def inputs(shapes):
    """Draws an input for each name of a table."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}


def linen(table, shapes):
    """Builds a network of branches; returns it with variables that differ from their initial values, and an input."""
    model, x = Branches(table), inputs(shapes)
    return model, zoo.trained(jax.eval_shape(model.init, jax.random.key(1), x)), x


def in_nnx(table, shapes):
    """Builds the module of a table, in evaluation and with other values than the initial ones, and an input for it."""
    graph, state = nnx.split(NnxBranches(table, nnx.Rngs(0)))
    model = nnx.merge(graph, zoo.trained(state))
    model.eval()
    return model, inputs(shapes)
