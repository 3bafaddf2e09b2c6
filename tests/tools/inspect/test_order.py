"""Tests the order of the rows, 10 after 9, and that a sentence about several layers stands there once."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import bnjax
from bnjax import tools

NAMES = [f"norm_{i}" for i in range(12)]  # sorted as text, norm_10 and norm_11 come before norm_2


def stats(var=2.0):
    return {"mean": jnp.zeros(2), "var": jnp.full(2, var)}


def module():
    return nnx.Dict({name: bnjax.nnx.BatchNorm(2, rngs=nnx.Rngs(0)) for name in NAMES})


def listed():
    return nnx.Dict(norms=nnx.List([bnjax.nnx.BatchNorm(2, rngs=nnx.Rngs(0)) for _ in NAMES]))


TREES = {
    "by_name": lambda: {name: stats() for name in sorted(NAMES)},
    "through_jit": lambda: jax.jit(lambda t: t)({name: stats() for name in NAMES}),
    "variables": lambda: {"batch_stats": {name: stats() for name in sorted(NAMES)}},
    "state": lambda: nnx.state(module()),
    "module": module,
    "pure_list": lambda: nnx.to_pure_dict(nnx.state(listed())),
    "list": listed,
}


def order(table):
    return [row["layer"].removeprefix("norms/").removeprefix("norm_") for row in table.rows]


@pytest.mark.parametrize("tree", TREES)
def test_ten_after_nine(tree):
    assert order(tools.inspect(TREES[tree]())) == [str(i) for i in range(12)]


def test_in_the_order_of_execution():
    """Checks that a tree that remembers the order of its layers, and moments, decide before names."""
    run = [*NAMES[6:], *NAMES[:6]]
    wanted = [name.removeprefix("norm_") for name in run]
    assert order(tools.inspect({"batch_stats": {name: stats() for name in run}})) == wanted
    moments = {name: bnjax.Moments(jnp.zeros(2), jnp.full(2, 2.0), jnp.full(2, 100.0)) for name in run}
    assert order(tools.inspect({name: stats() for name in sorted(NAMES)}, moments)) == wanted


def test_a_sentence_stands_there_once():
    """Checks that what is said of several layers is one line, which lists them in their order."""
    some = ["norm_2", "norm_9", "norm_10"]
    text = str(tools.inspect({name: stats(0.0 if name in some else 2.0) for name in NAMES}))
    flags = [line for line in text.splitlines() if line.startswith("!")]
    assert len(flags) == 1
    assert flags[0].startswith("! norm_2, norm_9, norm_10: 2 of 2 channels are constant")
    every = str(tools.inspect({name: stats(0.0) for name in NAMES})).splitlines()
    assert [line for line in every if line.startswith("!")] == [flags[0].replace(", ".join(some), "all 12 layers")]
    one = str(tools.inspect({"norm": stats(0.0)})).splitlines()
    assert one[-1] == flags[0].replace(", ".join(some), "norm")
