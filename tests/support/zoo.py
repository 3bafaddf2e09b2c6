"""Builds small networks with batch normalization in linen and nnx, and their checkpoints by Orbax."""

import itertools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

import bnjax


def nnx_norms():
    """Returns the nnx BatchNorm classes that the tools must accept: Flax's and bnjax's."""
    ours = getattr(bnjax, "nnx", None)
    return [nnx.BatchNorm] + ([ours.BatchNorm] if ours else [])


LINEN_NORMS = [nn.BatchNorm, bnjax.linen.BatchNorm]


class ConvNet(nn.Module):
    """Two Conv-BN-ReLU, a layer norm and a head: the kinds of parameters that a decay mask must distinguish."""

    norm: Any = bnjax.linen.BatchNorm

    @nn.compact
    def __call__(self, x, train=False, mask=None):
        for width in (4, 6):
            x = nn.Conv(width, (3, 3))(x)
            x = nn.relu(self.norm(use_running_average=not train)(x, mask=mask))
        x = nn.LayerNorm()(x.mean((1, 2)))
        return nn.Dense(5)(x)


class Nested(nn.Module):
    """Layers in blocks, scanned and vmapped, with statistics of shape [3, C] and [2, C]."""

    norm: Any = bnjax.linen.BatchNorm

    @nn.compact
    def __call__(self, x, train=False):
        axes = dict(variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True})
        x, _ = nn.scan(Block, length=3, **axes)(self.norm, train, name="blocks")(x, None)
        twins = nn.vmap(self.norm, in_axes=None, out_axes=0, axis_size=2, **axes)(not train, name="twins")(x)
        return nn.Dense(3)(twins.mean(0))


class Block(nn.Module):
    norm: Any
    train: bool

    @nn.compact
    def __call__(self, x, _):
        return nn.relu(self.norm(use_running_average=not self.train)(nn.Dense(3)(x))), None


class NnxNet(nnx.Module):
    """The ConvNet of this file in nnx, with a list of blocks."""

    def __init__(self, norm, rngs):
        widths = (3, 4, 6)
        pairs = list(itertools.pairwise(widths))
        self.convs = nnx.List([nnx.Conv(i, o, (3, 3), rngs=rngs) for i, o in pairs])
        self.norms = nnx.List([norm(o, rngs=rngs) for _, o in pairs])
        self.ln = nnx.LayerNorm(6, rngs=rngs)
        self.head = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x, mask=None):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x), mask=mask))
        return self.head(self.ln(x.mean((1, 2))))


def images(seed=0, rows=8, size=6, rank=4):
    return jax.random.normal(jax.random.key(seed), (rows, *[size] * (rank - 2), 3))


def trained(variables, seed=1):
    """Replaces values or shapes by random values, positive for variances and scales, so that nothing cancels."""
    keyed, structure = jax.tree_util.tree_flatten_with_path(variables)
    rng = np.random.default_rng(seed)

    def draw(keys, leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        spread = rng.normal(size=leaf.shape).astype(np.float32)
        name = jax.tree_util.keystr(keys)
        positive = "var" in name or "scale" in name
        return jnp.asarray(np.exp(0.3 * spread) if positive else 0.3 * spread, leaf.dtype)

    return structure.unflatten([draw(k, leaf) for k, leaf in keyed])


def linen_net(net=ConvNet, x=None, **fields):
    model = net(**fields)
    return model, trained(jax.eval_shape(model.init, jax.random.key(0), images() if x is None else x))


def nnx_net(norm):
    graph, state = nnx.split(nnx.eval_shape(lambda: NnxNet(norm, nnx.Rngs(0))))
    return nnx.merge(graph, trained(state))


def through_orbax(tree, folder):
    """Saves a tree and restores it without a target, as a user would after a restart."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "checkpoint", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "checkpoint")


def assert_trees_equal(actual, wanted):
    chex.assert_trees_all_equal(actual, wanted)
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)


def haiku_like(variables, rank=4):
    """Returns the trees of a Haiku network with the same modules as linen variables, filled with zeros."""
    params, state = {}, {}
    words = {"kernel": "w", "scale": "scale"}
    for module, held in variables["params"].items():
        norm = "scale" in held
        bias = {"bias": "offset" if norm else "b"}
        params[module] = {(words | bias)[role]: np.zeros(value.shape, "f4") for role, value in held.items()}
    for module, held in variables["batch_stats"].items():
        shape = (1,) * (rank - 1) + held["mean"].shape
        params[module] = {name: np.zeros(shape, "f4") for name in params[module]}
        ema = {"average": np.zeros(shape, "f4"), "hidden": np.zeros(shape, "f4"), "counter": np.zeros((), "i4")}
        state |= {f"{module}/~/{kind}_ema": ema for kind in ("mean", "var")}
    return params, state
