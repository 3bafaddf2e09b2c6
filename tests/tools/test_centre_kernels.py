"""Tests centred kernels: the formula, the gradient through it, and which kernels are meant."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax
from bnjax import tools
from tests.support import cases, zoo

UNIT = cases.unit("float32")


def centred(kernel):
    """Returns a kernel without its mean per output channel, in float64."""
    kernel = np.asarray(kernel, np.float64)
    return kernel - kernel.reshape(-1, kernel.shape[-1]).mean(0)


def check(before, after, of_convolution):
    """Compares two trees leaf by leaf; `of_convolution(path)` says whose kernels are centred."""
    for (keys, old), new in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
        path = jax.tree_util.keystr(keys)
        if "kernel" in path and of_convolution(path):
            cases.assert_close(new, centred(old), 8 * UNIT)
            assert np.abs(np.asarray(new).reshape(-1, new.shape[-1]).mean(0)).max() < 1e-6
        else:
            np.testing.assert_array_equal(new, old)


def test_linen():
    _, variables = zoo.linen_net()
    check(variables, tools.centre_kernels(variables), lambda path: "Conv" in path)
    check(variables["params"], tools.centre_kernels(variables["params"]), lambda path: "Conv" in path)


def test_nnx():
    model = zoo.nnx_net(bnjax.nnx.BatchNorm)
    state = nnx.state(model, nnx.Param)
    check(state, tools.centre_kernels(state), lambda path: "convs" in path)
    check(nnx.state(model), nnx.state(tools.centre_kernels(model)), lambda path: "convs" in path)


class Other(nn.Module):
    """A convolution over sequences, a transposed one, a depthwise one, and a dense one whose kernel has three axes."""

    @nn.compact
    def __call__(self, x):
        x = nn.ConvTranspose(6, (3,), name="up")(nn.Conv(6, (3,), name="stem")(x))
        x = nn.Conv(6, (3,), feature_group_count=6, name="depthwise")(x)
        return nn.DenseGeneral((2, 3), name="heads")(x)


def test_layers_are_named_where_there_are_others():
    params = Other().init(jax.random.key(0), jnp.ones((2, 8, 3)))["params"]
    named = tools.centre_kernels(params, layers=["stem", "up", "depthwise"])
    check(params, named, lambda path: "heads" not in path)
    check(params, tools.centre_kernels(params), lambda path: True)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    both = jax.vmap(tools.centre_kernels)(stacked)
    cases.assert_close(both["stem"]["kernel"][1], centred(2 * params["stem"]["kernel"]), 8 * UNIT)


def test_the_gradient_passes_through():
    """Checks against the projection of the gradient at the centred kernel, which is the derivative of centring."""
    kernel, x = jax.random.normal(jax.random.key(0), (3, 3, 2, 4)), jax.random.normal(jax.random.key(1), (2, 6, 6, 2))
    conv = nn.Conv(4, (3, 3), use_bias=False)

    def loss(params):
        return jnp.sin(conv.apply({"params": params}, x)).sum()

    found = jax.jit(jax.grad(lambda params: loss(tools.centre_kernels(params))))({"kernel": kernel})
    at_centred = jax.grad(loss)(tools.centre_kernels({"kernel": kernel}))
    cases.assert_close(found["kernel"], centred(at_centred["kernel"]), 1000 * UNIT)


def test_bfloat16_stays():
    kernel = jnp.ones((3, 3, 2, 4), jnp.bfloat16)
    assert tools.centre_kernels({"kernel": kernel})["kernel"].dtype == jnp.bfloat16


def test_errors():
    dense = {"Dense_0": {"kernel": np.ones((3, 4), np.float32)}}
    with pytest.raises(ValueError, match="no kernel of a convolution"):
        tools.centre_kernels(dense)
    with pytest.raises(ValueError, match="fits no layer"):
        tools.centre_kernels(dense, layers=["Conv_0"])
