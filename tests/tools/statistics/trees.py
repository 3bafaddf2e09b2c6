"""Builds trees of each kind that hold statistics, and takes them apart."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.support import zoo


def linen_tree(freeze=dict):
    return freeze(zoo.linen_net(zoo.Nested)[1])


TREES = {
    "linen": linen_tree,
    "frozen": lambda: linen_tree(flax.core.freeze),
    "batch_stats": lambda: linen_tree()["batch_stats"],
    "nnx_state": lambda: nnx.state(zoo.nnx_net(nnx.BatchNorm)),
    "nnx_stats": lambda: nnx.state(zoo.nnx_net(nnx.BatchNorm), nnx.BatchStat),
    "nnx_pair": lambda: nnx.split(zoo.nnx_net(nnx.BatchNorm), nnx.Param, nnx.BatchStat)[1:],
    "pure_dict": lambda: nnx.to_pure_dict(nnx.state(zoo.nnx_net(nnx.BatchNorm))),
}


def by_role(tree):
    """Returns means, variances and the rest, each as {path: array}."""
    keyed = jax.tree_util.tree_leaves_with_path(tree)
    roles = {"mean": {}, "var": {}, "rest": {}}
    for keys, leaf in keyed:
        path = jax.tree_util.keystr(keys)
        role = next((r for r in ("mean", "var") if f"'{r}'" in path), "rest")
        roles[role][path] = np.asarray(leaf)
    return roles


def stats(**channels):
    return {layer: {"mean": jnp.zeros(n), "var": jnp.ones(n)} for layer, n in channels.items()}
