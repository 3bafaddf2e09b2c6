"""Tests that every call of a layer counts, wherever its author put it: in loops, branches, remat and jit."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax
from bnjax import tools
from tests.support import zoo

XS = jnp.arange(12.0).reshape(3, 4, 1)  # three calls of four rows: mean 5.5, variance 143/12


class Tower(nn.Module):
    norm: Any

    @nn.compact
    def __call__(self, x):
        return self.norm(use_running_average=True, name="norm")(x)


class Siamese(nn.Module):
    """One tower that is called three times."""

    norm: Any
    lift: Any

    @nn.compact
    def __call__(self, xs):
        tower = self.lift(Tower)(self.norm, name="tower")
        return tower(xs[0]) + tower(xs[1]) + tower(xs[2])


class Looped(nn.Module):
    """A layer in a loop that carries its statistics."""

    norm: Any
    how: str

    @nn.compact
    def __call__(self, xs):
        norm = self.norm(use_running_average=True, name="norm")
        if self.is_initializing():
            return norm(xs[0])
        if self.how == "scan":
            scan = nn.scan(
                lambda norm, carry, x: (carry, norm(x)),
                variable_broadcast="params",
                variable_carry="batch_stats",
                split_rngs={"params": False},
            )
            return scan(norm, 0.0, xs)[1]
        return nn.while_loop(
            lambda norm, carry: carry[0] < 3,
            lambda norm, carry: (carry[0] + 1, carry[1] + norm(xs[carry[0]])),
            norm,
            (0, jnp.zeros((4, 1))),
            carry_variables="batch_stats",
            broadcast_variables="params",
        )[1]


class Together(nn.Module):
    """Every way to call a layer several times, each with a layer of its own."""

    norm: Any

    @nn.compact
    def __call__(self, xs):
        lifts = {"plain": lambda tower: tower, "remat": nn.remat, "jit": nn.jit, "both": lambda t: nn.remat(nn.jit(t))}
        for name, lift in lifts.items():
            Siamese(self.norm, lift, name=name)(xs)
        for how in ("scan", "while"):
            Looped(self.norm, how, name=how)(xs)
        axes = dict(variable_axes={"params": None, "batch_stats": None}, split_rngs={"params": False})
        pooled = functools.partial(self.norm, axis_name="rows")
        return nn.vmap(pooled, axis_name="rows", **axes)(use_running_average=True, name="vmap")(xs)


@pytest.mark.parametrize("norm", zoo.LINEN_NORMS)
@pytest.mark.parametrize("layerwise", [False, True])
def test_linen(norm, layerwise):
    model = Together(norm)
    variables = model.init(jax.random.key(0), XS)
    apply_fn = functools.partial(model.apply, mutable=["batch_stats"])
    result = tools.recalibrate(apply_fn, variables, [XS], layerwise=layerwise, progress=False)
    rows = {row["layer"]: (row["mean_over_std"], row["var_max"]) for row in tools.inspect(result, epsilon=0).rows}
    assert len(rows) == 7
    wanted = 5.5 / np.sqrt(143 / 12), 143 / 12
    assert rows == {layer: pytest.approx(wanted, rel=1e-6) for layer in rows}


def run(norm, x):
    return norm(x)


NNX_CALLS = {
    "scan": lambda norm, xs: nnx.scan(lambda norm, x: (norm, norm(x)), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))(
        norm, xs
    ),
    "carried": lambda norm, xs: nnx.scan(
        run, in_axes=(nnx.StateAxes({nnx.BatchStat: nnx.Carry, ...: None}), 0), out_axes=0
    )(norm, xs),
    "fori": lambda norm, xs: nnx.fori_loop(0, 3, lambda i, c: (c[0], c[1] + c[0](xs[i])), (norm, jnp.zeros((4, 1)))),
    "while": lambda norm, xs: nnx.while_loop(
        lambda c: c[2] < 3, lambda c: (c[0], c[1] + c[0](xs[c[2]]), c[2] + 1), (norm, jnp.zeros((4, 1)), 0)
    ),
    "remat": lambda norm, xs: [nnx.remat(run)(norm, x) for x in xs],
    "jit": lambda norm, xs: [nnx.jit(run)(norm, x) for x in xs],
    "cond": lambda norm, xs: [nnx.cond(True, run, run, norm, x) for x in xs],
}


class NnxTogether(nnx.Module):
    """Every way to call a layer several times in nnx, each with a layer of its own."""

    def __init__(self, norm):
        self.norms = nnx.Dict({name: norm(1, use_running_average=True, rngs=nnx.Rngs(0)) for name in NNX_CALLS})

    def __call__(self, xs):
        for name, call in NNX_CALLS.items():
            call(self.norms[name], xs)


@pytest.mark.parametrize("norm", zoo.nnx_norms())
def test_nnx(norm):
    result = tools.recalibrate(lambda m, xs: m(xs), NnxTogether(norm), [XS], progress=False)
    found = {name: (float(n.mean[0]), float(n.var[0])) for name, n in result.norms.items()}
    assert found == {name: pytest.approx((5.5, 143 / 12), rel=1e-6) for name in NNX_CALLS}


def test_moments_are_in_the_order_of_execution():
    """Checks that layer 10 comes after layer 9, and that names play no part."""

    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            for name in ("z", *([None] * 11), "a"):
                x = bnjax.linen.BatchNorm(use_running_average=True, use_scale=False, use_bias=False, name=name)(x)
            return x

    model, x = Deep(), XS[0]
    variables = jax.tree.map(jnp.asarray, model.init(jax.random.key(0), x))  # sorted by name, as after jit
    apply_fn = functools.partial(model.apply, mutable=["batch_stats"])
    moments = tools.collect_moments(apply_fn, variables, [x], progress=False)
    order = ["z", *(f"BatchNorm_{i}" for i in range(11)), "a"]
    assert list(moments) == order
    assert [row["layer"] for row in tools.inspect(variables, moments).rows] == order
