"""Tests which channels count as idle: judged by what they put out, with the epsilon of their layer."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax
from bnjax import tools

EPSILON = 1e-3  # as in Keras
# var, scale, bias -> whether the channel is constant, whether it is dead
CHANNELS = {
    "ordinary": ((1.0, 1.0, 0.0), (False, False)),
    "below_epsilon": ((1e-4, 1.0, 0.0), (False, False)),  # puts out a standard deviation of 0.3
    "far_below_and_scaled": ((1e-7, 500.0, 0.0), (False, False)),  # puts out 5
    "far_below": ((1e-10, 1.0, 0.0), (True, False)),  # puts out 0.0003, as its input hardly varies
    "constant": ((0.0, 1.0, 0.0), (True, False)),
    "scale_zero": ((1.0, 0.0, 0.0), (False, True)),
    "scale_decayed": ((1.0, 1e-6, 0.0), (False, True)),
    "lost_beside_the_bias": ((1.0, 2e-3, 1e5), (False, True)),  # less than the spacing of float32 at 1e5
}


def columns():
    var, scale, bias = (np.float32(column) for column in zip(*(c for c, _ in CHANNELS.values()), strict=True))
    return dict(var=var, mean=np.full_like(var, 0.0), scale=scale, bias=bias)


def in_variables(leaves):
    stats, params = ({n: jnp.asarray(leaves[n]) for n in names} for names in (("mean", "var"), ("scale", "bias")))
    return tools.inspect({"params": {"bn": params}, "batch_stats": {"bn": stats}}, epsilon=EPSILON)


def in_module(norm):
    """Returns the inspection of an nnx module, which has an epsilon of its own."""

    def look(leaves):
        module = norm(len(leaves["var"]), epsilon=EPSILON, rngs=nnx.Rngs(0))
        for name, value in leaves.items():
            getattr(module, name)[...] = value
        return tools.inspect(nnx.Dict(bn=module))

    return look


LOOKS = {"linen": in_variables, "nnx": in_module(bnjax.nnx.BatchNorm), "flax_nnx": in_module(nnx.BatchNorm)}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("name", CHANNELS)
def test_one_channel(look, name):
    """Checks one channel beside an ordinary one."""
    at = [0, list(CHANNELS).index(name)]
    (row,) = LOOKS[look]({role: leaf[at] for role, leaf in columns().items()}).rows
    assert (row["constant"], row["dead"]) == CHANNELS[name][1]


@pytest.mark.parametrize("look", LOOKS)
def test_a_layer(look):
    """Checks the counts and the sentences of a layer of all these channels."""
    (row,) = LOOKS[look](columns()).rows
    constant, dead = (sum(said) for said in zip(*(said for _, said in CHANNELS.values()), strict=True))
    assert (row["constant"], row["dead"]) == (constant, dead)
    assert f"{constant} of {len(CHANNELS)} channels are constant" in row["flags"][0]
    assert f"{dead} of {len(CHANNELS)} channels have a scale next to zero" in row["flags"][1]


def test_the_epsilon_decides():
    """Checks that a variance far below one epsilon is alive with a smaller one, which a module says by itself."""
    leaves = dict(var=np.float32([1, 1e-10]), mean=np.zeros(2, "f4"), scale=np.ones(2, "f4"), bias=np.zeros(2, "f4"))
    for epsilon, constant in ((1e-3, 1), (1e-12, 0)):
        module = bnjax.nnx.BatchNorm(2, epsilon=epsilon, rngs=nnx.Rngs(0))
        module.var[...] = leaves["var"]
        assert tools.inspect(nnx.Dict(bn=module)).rows[0]["constant"] == constant
        assert tools.inspect(nnx.state(nnx.Dict(bn=module)), epsilon=epsilon).rows[0]["constant"] == constant
