"""Tests the converters against Haiku: outputs, gradients and updated statistics of one network over two steps."""

import functools
import importlib.util
import runpy
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
from bnjax import tools
from tests.support import zoo

FIXTURES = Path(__file__).parents[1] / "fixtures"
DECAY = 0.8


def script():
    """Runs the program that made the fixture, and returns its names."""
    return runpy.run_path(str(FIXTURES / "make_haiku_network.py"))


def live():
    """Computes the reference now, with the steps that were recorded."""
    with jax.numpy_rank_promotion("allow"):
        return script()["reference"]()


# the recorded arrays and, if Haiku is installed, those computed now
REFERENCES = {"recorded": lambda: tools.read_arrays(FIXTURES / "haiku_network.npz")}
if importlib.util.find_spec("haiku"):
    REFERENCES["live"] = live


class Network(nn.Module):
    """The network of the fixture."""

    debias: bool = True

    @nn.compact
    def __call__(self, x, train=False):
        def norm(name, use_scale=True, use_bias=True, **fields):
            fields = tools.fields_from_haiku(DECAY, **fields) | dict(debias=self.debias)
            return bnjax.linen.BatchNorm(not train, name=name, use_scale=use_scale, use_bias=use_bias, **fields)

        x = nn.Conv(4, (3, 3), 2, use_bias=False, name="conv")(x)
        x = nn.relu(norm("bn")(x))
        x = nn.Conv(8, (3, 3), feature_group_count=4, name="depth")(x)
        x = nn.relu(norm("bn2", use_bias=False, eps=1e-2)(x))
        x = nn.Conv(6, (1, 1), feature_group_count=2, name="grouped")(x)
        x = nn.ConvTranspose(2, (2, 2), (2, 2), padding="VALID", name="up")(x)
        return norm("bn3", use_scale=False)(nn.Dense(5, name="fc")(x.reshape(x.shape[0], -1)))


MODULES = ("conv", "depth", "bn2", "grouped", "up", "fc", "bn3")
OPTIONS = dict(names={name: f"net/{name}" for name in MODULES} | {"bn": "net/~/bn"}, transposed=["up"])


def nested(arrays, kind):
    """Returns Haiku's tree of two levels, of the arrays called kind.module/name."""
    tree = {}
    for key, value in arrays.items():
        if key.startswith(kind + "."):
            module, _, name = key.removeprefix(kind + ".").rpartition("/")
            tree.setdefault(module, {})[name] = value
    return tree


@pytest.fixture(params=REFERENCES, scope="module")
def reference(request):
    arrays = REFERENCES[request.param]()
    trees = {kind: nested(arrays, kind) for kind in ("before.params", "before.state", "grad", "after", "again")}
    return {name: value for name, value in arrays.items() if "." not in name} | trees


def blank(debias=True):
    return zoo.trained(jax.eval_shape(Network(debias).init, jax.random.key(0), jnp.zeros((1, 6, 4, 3))))


@pytest.fixture(scope="module")
def variables(reference):
    return tools.from_haiku(reference["before.params"], reference["before.state"], blank(), **OPTIONS)


def back(variables, reference, **options):
    like = reference["before.params"], reference["before.state"]
    return tools.to_haiku(variables, *like, **{"decay_rate": DECAY, **OPTIONS, **options})


@functools.partial(jax.jit, static_argnames="debias")
def train(variables, x, h, debias=True):
    """Returns the gradients of Σ h·y, y, and the updated statistics."""

    def loss(params):
        both = {**variables, "params": params}
        y, updates = Network(debias).apply(both, x, train=True, mutable=["batch_stats"])
        return jnp.sum(y * h), (y, updates)

    grads, (y, updates) = jax.grad(loss, has_aux=True)(variables["params"])
    return grads, y, updates


def step(variables, x, debias=True):
    """Returns the variables after one more batch with the same weights."""
    return {**variables, **train(variables, x, np.ones((7, 5), np.float32), debias)[2]}


def close(actual, wanted, what=""):
    """Asserts equality to 1e-5 of the largest value."""
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-5 * (np.abs(wanted).max() + 1e-3), err_msg=what)


def all_close(actual, wanted):
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    jax.tree.map_with_path(lambda keys, a, w: close(a, w, jax.tree_util.keystr(keys)), actual, wanted)


def test_evaluation(reference, variables):
    close(jax.jit(Network().apply)(variables, reference["x"]), reference["evaluated"])


def test_a_training_step(reference, variables):
    """Checks output, gradients, and the whole state after the step: averages, hidden and counters."""
    grads, y, updates = train(variables, reference["x"], reference["h"])
    close(y, reference["trained"])
    converted, state = back({"params": grads, **updates}, reference)
    all_close(state, reference["after"])
    for module, wanted in reference["grad"].items():
        for name, grad in wanted.items():
            # the gradient of a bias before a normalization is zero but for rounding: measured against its weight's
            magnitude = np.abs(wanted.get("w", grad)).max()
            np.testing.assert_allclose(converted[module][name], grad, rtol=0, atol=2e-5 * magnitude, err_msg=module)


def test_training_goes_on_as_in_haiku(reference, variables):
    """Checks a second step, which depends on how many batches the debiased averages hold."""
    for x in (reference["x"], reference["next"]):
        variables = step(variables, x)
    all_close(back(variables, reference)[1], reference["again"])


def test_there_and_back(reference, variables):
    params, state = back(variables, reference)
    assert jax.tree.structure(params) == jax.tree.structure(reference["before.params"])
    zoo.assert_trees_equal(params, reference["before.params"])
    for name, held in reference["before.state"].items():
        wanted = np.maximum(held["average"], 0) if name.endswith("var_ema") else held["average"]
        np.testing.assert_array_equal(state[name]["average"], wanted)
        np.testing.assert_array_equal(state[name]["counter"], held["counter"])
        np.testing.assert_allclose(state[name]["hidden"], held["hidden"], rtol=1e-6, atol=1e-7)
        assert {k: v.dtype for k, v in state[name].items()} == {k: v.dtype for k, v in held.items()}
    again = tools.from_haiku(params, state, tools.reset_stats(variables), **OPTIONS)
    zoo.assert_trees_equal(again, variables)


def test_without_steps(reference, variables):
    """Checks averages without steps: in Haiku their counter is so large that debiasing has no effect."""
    plain = tools.from_haiku(reference["before.params"], reference["before.state"], blank(debias=False), **OPTIONS)
    assert set(plain["batch_stats"]["bn"]) == {"mean", "var"}
    zoo.assert_trees_equal(plain["batch_stats"]["bn"]["mean"], variables["batch_stats"]["bn"]["mean"])
    _, state = back(plain, reference, decay_rate=None)
    held = state["net/bn2/~/var_ema"]
    np.testing.assert_array_equal(held["hidden"], held["average"])
    # Haiku computes (hidden·d + new·(1 − d)) / (1 − dⁿ), whose denominator is 1 here for every d below 1
    for decay in (0.0, 0.5, 0.999, np.nextafter(np.float32(1), np.float32(0))):
        assert 1 - jnp.power(jnp.float32(decay), held["counter"] + 1) == 1
    assert np.iinfo(np.int32).max - held["counter"] > 10**9


if "live" in REFERENCES:

    @pytest.mark.parametrize("debias", [False, True])
    def test_haiku_goes_on_as_training_here(debias):
        """Checks the other direction: a step in Haiku from converted trees equals a step in bnjax."""
        net, x = script()["network"](), jax.random.normal(jax.random.key(1), (7, 6, 4, 3))
        with jax.numpy_rank_promotion("allow"):
            like = net.init(jax.random.key(0), x, is_training=True)
            variables = step(tools.reset_stats(blank(debias)), x, debias)
            converted = tools.to_haiku(variables, *like, decay_rate=DECAY, **OPTIONS)
            y, state = net.apply(*converted, None, 1 + 2 * x, is_training=True)
        wanted = train(variables, 1 + 2 * x, np.ones((7, 5), np.float32), debias)[1]
        close(y, wanted)
        all_close(
            tools.from_haiku(converted[0], state, blank(debias), **OPTIONS)["batch_stats"],
            step(variables, 1 + 2 * x, debias)["batch_stats"],
        )


def test_the_recorded_reference_is_that_of_the_script():
    recorded = REFERENCES["recorded"]()
    wanted = REFERENCES.get("live", REFERENCES["recorded"])()
    assert recorded.keys() == wanted.keys()
    for name, value in wanted.items():
        if name.startswith("grad"):  # gradients of biases before a normalization are only rounding
            np.testing.assert_allclose(recorded[name], value, rtol=1e-4, atol=1e-4, err_msg=name)
        else:
            close(recorded[name], value, name)


def test_variances_below_zero():
    """Checks that a variance that Haiku's rounding made negative becomes 0."""
    arrays = REFERENCES["recorded"]()
    trees = [nested(arrays, f"before.{kind}") for kind in ("params", "state")]
    assert trees[1]["net/bn2/~/var_ema"]["average"].min() < 0
    assert tools.from_haiku(*trees, blank(), **OPTIONS)["batch_stats"]["bn2"]["var"].min() == 0
