"""recalibrate: the statistics of all rows at once, for every way of batching, masking, sharding and lifting them."""

import functools

import jax
import numpy as np
import pytest

import bnjax
import cases
import tools_models as zoo
from bnjax import tools

# Float32 layers between the input and a deep layer's statistics: some ten roundings of sums over at most 2^10 rows.
TOLERANCE = 100 * cases.unit("float32")


def linen_fn(model, **options):
    return functools.partial(model.apply, mutable=["batch_stats"], **options)


def momentum_zero(net, variables, x, norm=bnjax.linen.BatchNorm):
    """The statistics of a training step with momentum 0: the moments of x in every layer, by the module itself."""
    model = net(norm=functools.partial(norm, momentum=0.0))
    return model.apply(variables, x, train=True, mutable=["batch_stats"])[1]["batch_stats"]


def close(actual, wanted, tolerance=TOLERANCE):
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    jax.tree.map(lambda a, w: cases.assert_close(a, w, tolerance, np.max(np.abs(w)) + 1), actual, wanted)


@pytest.mark.parametrize("norm", zoo.LINEN_NORMS)
@pytest.mark.parametrize("net", [zoo.ConvNet, zoo.Nested])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("layerwise", [False, True])
def test_one_batch_is_its_moments(norm, net, train, layerwise):
    """With all the data in one batch both ways are exact, in either mode of the model, through scan and vmap."""
    x = zoo.images(1)
    model, variables = zoo.linen_net(net, norm=norm)
    result = tools.recalibrate(linen_fn(model, train=train), variables, [x], layerwise=layerwise, progress=False)
    zoo.assert_trees_equal(result["params"], variables["params"])
    close(result["batch_stats"], momentum_zero(net, variables, x))
