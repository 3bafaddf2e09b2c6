"""Tests the converters against PyTorch: outputs, gradients and updated statistics of one network and one step."""

import importlib.util
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
    return runpy.run_path(str(FIXTURES / "make_torch_network.py"))["reference"]()


# the recorded arrays and, if PyTorch is installed, those computed now
REFERENCES = {"recorded": lambda: tools.read_arrays(FIXTURES / "torch_network.npz")}
if importlib.util.find_spec("torch"):
    REFERENCES["live"] = live


class Network(nn.Module):
    """The network of the fixture."""

    momentum: float | None = 0.2

    @nn.compact
    def __call__(self, x, train=False):
        norm = lambda name: bnjax.linen.BatchNorm(  # noqa: E731
            not train, name=name, **tools.fields_from_torch(momentum=self.momentum, eps=1e-3)
        )
        x = nn.Conv(4, (3, 3), 2, padding=1, use_bias=False, name="conv")(x)
        x = nn.relu(norm("bn")(x))
        x = nn.Conv(8, (3, 3), padding=1, feature_group_count=4, name="depth")(x)
        x = nn.relu(norm("bn2")(x))
        x = nn.ConvTranspose(2, (2, 2), (2, 2), padding="VALID", name="up")(x)
        return norm("bn3")(nn.Dense(5, name="fc")(x.reshape(x.shape[0], -1)))


OPTIONS = dict(flattened={"fc": (2, 6, 4)}, transposed=["up"])


@pytest.fixture(params=REFERENCES, scope="module")
def reference(request):
    arrays = REFERENCES[request.param]()
    parts = {key: {} for key in ("before", "grad", "after")}
    for name, value in arrays.items():
        kind, _, rest = name.partition(".")
        parts[kind].update({rest: value}) if rest else parts.update({name: value})
    return parts


def blank(**fields):
    return zoo.trained(jax.eval_shape(Network(**fields).init, jax.random.key(0), jnp.zeros((1, 6, 4, 3))))


@pytest.fixture(scope="module")
def variables(reference):
    return tools.from_torch(reference["before"], blank(), **OPTIONS)


def close(actual, wanted, what=""):
    """Asserts equality to 1e-5 of the largest value."""
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-5 * (np.abs(wanted).max() + 1e-3), err_msg=what)


def channels_last(x):
    return jnp.asarray(x).transpose(0, 2, 3, 1)


def test_evaluation(reference, variables):
    close(jax.jit(Network().apply)(variables, channels_last(reference["x"])), reference["evaluated"])


def test_a_training_step(reference, variables):
    """Checks output, gradients and statistics after the step, with Bessel's correction."""

    def loss(params):
        both = {**variables, "params": params}
        y, updates = Network().apply(both, channels_last(reference["x"]), train=True, mutable=["batch_stats"])
        return jnp.sum(y * reference["h"]), (y, updates)

    grads, (y, updates) = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    close(y, reference["trained"])
    converted = tools.to_torch({"params": grads, **updates}, **OPTIONS)
    for name, wanted in reference["grad"].items():
        # the gradient of a bias in front of a normalization is zero but for rounding: measured against its weight's
        magnitude = np.abs(reference["grad"][name.replace("bias", "weight")]).max()
        np.testing.assert_allclose(converted[name], wanted, rtol=0, atol=2e-5 * magnitude, err_msg=name)
    for name, wanted in reference["after"].items():
        if "running" in name:
            close(converted[name], wanted, name)


def test_there_and_back(reference, variables):
    state = tools.to_torch(variables, **OPTIONS)
    assert state.keys() == reference["before"].keys()
    for name, wanted in reference["before"].items():
        np.testing.assert_array_equal(state[name], wanted, err_msg=name)
    zoo.assert_trees_equal(tools.from_torch(state, tools.reset_stats(variables), **OPTIONS), variables)


def test_counted_batches(reference):
    """Checks that the count of batches under momentum=None is converted."""
    assert tools.fields_from_torch(momentum=None)["momentum"] is None
    counting = blank(momentum=None)
    filled = tools.from_torch(reference["after"], counting, **OPTIONS)
    np.testing.assert_array_equal(filled["batch_stats"]["bn"]["steps"], 1)
    assert tools.to_torch(filled, **OPTIONS)["bn.num_batches_tracked"] == 1
    uncounted = {name: value for name, value in reference["after"].items() if "num_batches" not in name}
    with pytest.raises(ValueError, match=r"count batches, and the state has no count: say steps="):
        tools.from_torch(uncounted, counting, **OPTIONS)
    filled = tools.from_torch(uncounted, counting, steps=20, **OPTIONS)
    np.testing.assert_array_equal(filled["batch_stats"]["bn"]["steps"], 20)


def test_the_recorded_reference_is_that_of_the_script():
    recorded = REFERENCES["recorded"]()
    for name, value in REFERENCES.get("live", REFERENCES["recorded"])().items():
        close(recorded[name], value, name)


@pytest.mark.parametrize("norm", zoo.nnx_norms())
def test_nnx(norm):
    """Checks an nnx module and its state, whose paths become names, with layer normalization."""
    model = zoo.nnx_net(norm)
    state = tools.to_torch(model)
    assert {"convs.0.weight", "norms.1.running_var", "ln.weight", "head.bias"} <= state.keys()
    assert state["convs.1.weight"].shape == (6, 4, 3, 3)
    filled = tools.from_torch(state, zoo.trained(nnx.state(model), 5))
    zoo.assert_trees_equal(nnx.to_pure_dict(filled), nnx.to_pure_dict(nnx.state(model)))
    filled = tools.from_torch(state, nnx.eval_shape(lambda: zoo.NnxNet(norm, nnx.Rngs(1))))
    assert type(filled) is zoo.NnxNet
    zoo.assert_trees_equal(nnx.state(filled), nnx.state(model))


def test_names_and_checkpoints(tmp_path):
    _, variables = zoo.linen_net()
    names = {"Conv_0": "features.0", "BatchNorm_0": "features.1", "Dense_0": "classifier"}
    restored = zoo.through_orbax(variables, tmp_path)
    state = tools.to_torch(restored, names=names)
    assert {"features.0.weight", "features.1.running_mean", "classifier.weight", "Conv_1.weight"} <= state.keys()
    zoo.assert_trees_equal(tools.from_torch(state, zoo.trained(variables, 4), names=names), variables)


def test_errors():
    variables = {"batch_stats": {"bn": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}}
    state = tools.to_torch(variables)
    spare = {**state, "fc.weight": np.ones((2, 2))}
    cases_ = [
        (spare, variables, {}, r"has \['fc.weight'\] besides"),
        ({k: v for k, v in state.items() if "var" not in k}, variables, {}, r"lacks \['bn.running_var'\]"),
        (state | {"bn.running_var": np.ones(3)}, variables, {}, r"shape \(3,\) in Flax's order of axes; bn/var"),
        (state, variables, {"names": {"bm": "bn"}}, r"\['bm'\] are no modules"),
        (state, {}, {}, "holds no batch normalization"),
    ]
    for given, tree, options, message in cases_:
        with pytest.raises(ValueError, match=message):
            tools.from_torch(given, tree, **options)
    with pytest.raises(ValueError, match="bn/gamma has no counterpart"):
        tools.to_torch({**variables, "params": {"bn": {"gamma": jnp.ones(2)}}})
    with pytest.raises(ValueError, match="weight of the NEW value"):
        tools.fields_from_torch(momentum=-0.1)
