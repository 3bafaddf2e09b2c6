"""Tests the converters against Keras: outputs, gradients and updated statistics of one network and one step."""

import importlib.util
import os
import runpy
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax
from bnjax import tools
from tests.support import zoo

FIXTURES = Path(__file__).parents[1] / "fixtures"


def live():
    """Computes the reference now, with the step that was recorded."""
    os.environ["KERAS_BACKEND"] = "jax"
    with jax.numpy_rank_promotion("allow"):
        return runpy.run_path(str(FIXTURES / "make_keras_network.py"))["reference"]()


# the recorded arrays and, if Keras is installed, those computed now
REFERENCES = {"recorded": lambda: tools.read_arrays(FIXTURES / "keras_network.npz")}
if importlib.util.find_spec("keras"):
    REFERENCES["live"] = live


class Network(nn.Module):
    """The network of the fixture."""

    @nn.compact
    def __call__(self, x, train=False):
        def norm(name, epsilon=1e-3):
            return bnjax.linen.BatchNorm(not train, name=name, momentum=0.8, epsilon=epsilon)

        x = nn.Conv(4, (3, 3), 2, use_bias=False, name="conv")(x)
        x = nn.relu(norm("bn")(x))
        x = nn.Conv(8, (3, 3), feature_group_count=4, name="depth")(x)
        x = nn.relu(norm("bn2", epsilon=1e-2)(x))
        x = nn.Conv(6, (1, 1), feature_group_count=2, name="grouped")(x)
        x = nn.ConvTranspose(2, (2, 2), (2, 2), padding="VALID", name="up")(x)
        return norm("bn3")(nn.Dense(5, name="fc")(x.reshape(x.shape[0], -1)))


MODULES = ("conv", "bn", "depth", "bn2", "grouped", "up", "fc", "bn3")
OPTIONS = dict(names={name: f"sequential/{name}" for name in MODULES}, transposed=["up"])


@pytest.fixture(params=REFERENCES)
def reference(request):
    parts = {"before": {}, "grad": {}, "after": {}}
    for name, value in REFERENCES[request.param]().items():
        kind, _, rest = name.partition(".")
        parts[kind].update({rest: value}) if rest else parts.update({name: value})
    return parts


@pytest.fixture
def variables(reference):
    blank = Network().init(jax.random.key(0), jnp.zeros((1, 6, 4, 3)))
    return tools.from_keras(reference["before"], blank, **OPTIONS)


def close(actual, wanted, what=""):
    """Asserts equality to 1e-5 of the largest value."""
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-5 * (np.abs(wanted).max() + 1e-3), err_msg=what)


def test_evaluation(reference, variables):
    close(Network().apply(variables, reference["x"]), reference["evaluated"])


def test_a_training_step(reference, variables):
    """Checks output, gradients and statistics after the step."""

    def loss(params):
        both = {**variables, "params": params}
        y, updates = Network().apply(both, reference["x"], train=True, mutable=["batch_stats"])
        return jnp.sum(y * reference["h"]), (y, updates)

    grads, (y, updates) = jax.grad(loss, has_aux=True)(variables["params"])
    close(y, reference["trained"])
    converted = tools.to_keras({"params": grads, **updates}, depthwise={"depth": 2}, **OPTIONS)
    for name, wanted in reference["grad"].items():
        # the gradient of a bias in front of a normalization is zero but for rounding: measured against its weight's
        weight = name.replace("bias", "kernel").replace("beta", "gamma")
        magnitude = np.abs(reference["grad"][weight]).max()
        np.testing.assert_allclose(converted[name], wanted, rtol=0, atol=2e-5 * magnitude, err_msg=name)
    for name, wanted in reference["after"].items():
        close(converted[name], wanted, name)


def test_there_and_back(reference, variables):
    state = tools.to_keras(variables, depthwise={"depth": 2}, **OPTIONS)
    assert state.keys() == reference["before"].keys()
    for name, wanted in reference["before"].items():
        np.testing.assert_array_equal(state[name], wanted, err_msg=name)
    zoo.assert_trees_equal(tools.from_keras(state, tools.reset_stats(variables), **OPTIONS), variables)


def test_from_pytorch_to_keras():
    """Checks that PyTorch's format converts to Keras' by way of the variables of bnjax."""
    _, variables = zoo.linen_net()
    state = tools.to_keras(tools.from_torch(tools.to_torch(variables), zoo.trained(variables, 3)))
    zoo.assert_trees_equal(tools.from_keras(state, zoo.trained(variables, 4)), variables)


@pytest.mark.parametrize("norm", zoo.nnx_norms())
def test_nnx(norm):
    model = zoo.nnx_net(norm)
    state = tools.to_keras(model)
    assert {"convs/0/kernel", "norms/1/moving_variance", "ln/gamma"} <= state.keys()
    filled = tools.from_keras(state, zoo.NnxNet(norm, nnx.Rngs(1)))
    np.testing.assert_array_equal(filled(zoo.images()), model(zoo.images()))


def test_a_checkpoint(tmp_path):
    _, variables = zoo.linen_net()
    restored = zoo.through_orbax(variables, tmp_path)
    zoo.assert_trees_equal(tools.to_keras(restored), tools.to_keras(variables))


def test_errors():
    variables = {"batch_stats": {"bn": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}}
    state = tools.to_keras(variables)
    with pytest.raises(ValueError, match=r"has \['dense/kernel'\] besides"):
        tools.from_keras({**state, "dense/kernel": np.ones((2, 2))}, variables)
    with pytest.raises(ValueError, match=r"lacks \['bn/moving_mean'\]"):
        tools.from_keras({"bn/moving_variance": np.ones(2)}, variables)
    counted = {"batch_stats": {"bn": {**variables["batch_stats"]["bn"], "steps": jnp.full(2, 3.0)}}}
    assert tools.to_keras(counted).keys() == state.keys()
    with pytest.raises(ValueError, match=r"\['bn'\] count batches, and the state has no count: say steps="):
        tools.from_keras(state, counted)
    loaded = tools.from_keras(state, counted, steps=1000)
    np.testing.assert_array_equal(loaded["batch_stats"]["bn"]["steps"], 1000)
    with pytest.raises(ValueError, match="holds no batch normalization"):
        tools.from_keras(state, {})
