"""Tests that the networks of the experiments are those of the papers."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from bnjax.linen import BatchNorm
from experiments.models.convolutional import ResNet20, max_pool, shortcut
from experiments.models.residual import Bottleneck, ResNet


def test_resnet20_is_the_papers() -> None:
    """Checks the counts of the paper's table 6: 0.27 million parameters, 19 convolutions each with a BN, one Dense
    layer.
    """
    model = ResNet20(partial(BatchNorm, momentum=0.9))
    for shape in ((1, 32, 32, 3), (1, 28, 28, 1)):
        found = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), jnp.zeros(shape))
        names = [name.split("_")[0] for name in found["params"]]
        assert (names.count("Conv"), names.count("BatchNorm"), names.count("Dense")) == (19, 19, 1)
        assert round(sum(leaf.size for leaf in jax.tree.leaves(found["params"])) / 1e4) == 27


def test_resnet50_is_the_papers() -> None:
    """Checks 25.6 million parameters, 53 convolutions each with a BN, and that a block can begin as its shortcut."""
    model = ResNet(partial(BatchNorm, momentum=0.9), zero_scale=True)
    found = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    paths = ["/".join(path) for path in flatten_dict(found["params"])]
    assert [sum(name in path for path in paths) for name in ("Conv_", "/scale")] == [53, 53]
    assert round(sum(leaf.size for leaf in jax.tree.leaves(found["params"])) / 1e5) == 256
    block, x = Bottleneck(partial(BatchNorm, use_running_average=True), 2, zero_scale=True), jnp.ones((1, 4, 4, 8))
    np.testing.assert_array_equal(block.apply(block.init(jax.random.key(0), x), x), x)


def test_a_shortcut_takes_every_second_position_and_adds_channels_of_zeros() -> None:
    x = jnp.arange(2.0 * 4 * 4 * 3).reshape(2, 4, 4, 3)
    found = shortcut(x, 5, 2)
    np.testing.assert_array_equal(found[..., :3], x[:, ::2, ::2])
    assert found.shape == (2, 2, 2, 5) and not np.any(found[..., 3:])


@pytest.mark.parametrize("size", [6, 7])
def test_max_pool_is_that_of_flax(size: int) -> None:
    x = np.random.default_rng(size).normal(size=(2, size, size, 3)).astype(np.float32)
    pooled, flax = (partial(pool, x) for pool in (max_pool, partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2))))
    np.testing.assert_array_equal(pooled(), flax())
