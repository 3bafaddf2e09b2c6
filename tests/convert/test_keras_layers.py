"""Tests layers that Keras stores differently: separable, depthwise, batch renormalization, numbered weights, models."""

import importlib.util
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
from bnjax import tools
from tests.support import zoo

RNG = np.random.default_rng(0)
NAMES = {"depth": "sep", "point": "sep"}


class Separable(nn.Module):
    """Keras' SeparableConv2D with a depth multiplier, followed by batch renormalization."""

    multiplier: int
    size: int = 3

    @nn.compact
    def __call__(self, x):
        groups = x.shape[-1]
        depth = dict(padding="VALID", feature_group_count=groups, use_bias=False, name="depth")
        x = nn.Conv(groups * self.multiplier, (self.size, self.size), **depth)(x)
        x = nn.Conv(5, (1, 1), name="point")(x)
        return bnjax.linen.BatchRenorm(use_running_average=True, epsilon=1e-3, name="bn")(x)


def separable(multiplier, size=3):
    """Returns the weights by Keras' names, with the averages of renorm=True, and a function that computes the layer."""
    state = {
        "sep/depthwise_kernel": RNG.normal(size=(size, size, 3, multiplier)),
        "sep/pointwise_kernel": RNG.normal(size=(1, 1, 3 * multiplier, 5)),
        "sep/bias": RNG.normal(size=5),
    }
    norm = ("gamma", "beta", "moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev")
    state |= {f"bn/{word}": RNG.uniform(0.5, 2, size=5) for word in norm}

    def formula(x):
        rows = [x[:, i : i + x.shape[1] - size + 1] for i in range(size)]
        depth = sum(
            row[:, :, j : j + x.shape[2] - size + 1, :, None] * state["sep/depthwise_kernel"][i, j]
            for i, row in enumerate(rows)
            for j in range(size)
        )
        y = depth.reshape(*depth.shape[:3], -1) @ state["sep/pointwise_kernel"][0, 0] + state["sep/bias"]
        rstd = 1 / np.sqrt(state["bn/moving_variance"] + 1e-3)
        return (y - state["bn/moving_mean"]) * rstd * state["bn/gamma"] + state["bn/beta"]

    return {name: value.astype(np.float32) for name, value in state.items()}, formula


def numbered(state):
    """Renames the weights to the numbered names that the files of Keras 3 have."""
    counts, result = {}, {}
    for name, value in state.items():
        layer = name.rpartition("/")[0]
        result[f"{layer}/vars/{counts.setdefault(layer, 0)}"] = value
        counts[layer] += 1
    return result


@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("form", [dict, numbered])
def test_separable_convolutions_and_renorm(multiplier, size, form):
    """Checks one Keras layer against two modules, and the way back, which drops the averages of renorm=True."""
    state, formula = separable(multiplier, size)
    x = RNG.normal(size=(2, 6, 5, 3)).astype(np.float32)
    model = Separable(multiplier, size)
    blank = model.init(jax.random.key(0), x)
    variables = tools.from_keras(form(state), blank, names=NAMES, steps=1000)
    np.testing.assert_allclose(model.apply(variables, x), formula(x.astype(np.float64)), rtol=0, atol=2e-4)
    back = tools.to_keras(variables, names=NAMES, depthwise={"depth": multiplier})
    wanted = {name: v for name, v in state.items() if "renorm" not in name and "stddev" not in name}
    assert back.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)


def test_a_map_of_separable_convolutions_is_proposed():
    state, _ = separable(2)
    state = {
        f"m/{name.replace('sep', 'separable_conv2d').replace('bn', 'batch_normalization')}": v
        for name, v in state.items()
    }
    blank = Separable(2).init(jax.random.key(0), jnp.ones((1, 6, 6, 3)))
    wanted = {"depth": "m/separable_conv2d", "point": "m/separable_conv2d", "bn": "m/batch_normalization"}
    state = {name: v for name, v in state.items() if "renorm" not in name and "stddev" not in name}
    assert tools.propose_names(state, blank, library="keras") == wanted


def test_depthwise_kernels_of_older_versions():
    """Checks that `depthwise_kernel`, with or without ":0", is never read as a transposed convolution's."""
    kernel = RNG.normal(size=(3, 3, 4, 1)).astype(np.float32)
    variables = {"params": {"conv": {"kernel": jnp.zeros((3, 3, 1, 4))}}}
    for name in ("conv/depthwise_kernel", "conv/depthwise_kernel:0"):
        loaded = tools.from_keras({name: kernel}, variables)
        np.testing.assert_array_equal(loaded["params"]["conv"]["kernel"], kernel.reshape(3, 3, 1, 4))


@pytest.mark.parametrize("roles", [("scale", "bias"), ("scale",), ("bias",), ()])
@pytest.mark.parametrize("renorm", [False, True])
def test_numbered_weights_of_a_normalization(roles, renorm):
    """Checks weights numbered in Keras' order; three weights are ambiguous, so they are an error."""
    variables = zoo.trained(
        {
            "params": {"bn": {role: jnp.ones(3) for role in roles}},
            "batch_stats": {"bn": {"mean": jnp.zeros(3), "var": jnp.ones(3)}},
        }
    )
    state = tools.to_keras(variables)
    order = ("gamma", "beta", "moving_mean", "moving_variance")
    state = {f"bn/{word}": state[f"bn/{word}"] for word in order if f"bn/{word}" in state}
    state |= {f"bn/{word}": np.full(3, 9.0) for word in ("a", "b", "c") if renorm}
    blank = zoo.trained(variables, 6)
    if len(roles) == 1:
        with pytest.raises(ValueError, match=r"bn numbers its variables.*\.keras"):
            tools.from_keras(numbered(state), blank)
    else:
        zoo.assert_trees_equal(tools.from_keras(numbered(state), blank), variables)
    with pytest.raises(ValueError, match=r"do not correspond|look alike"):
        tools.from_keras(numbered(state | {"bn/d": np.ones(3)}), blank)


def test_states_that_are_none():
    variables = {"params": {"fc": {"kernel": jnp.zeros((2, 2))}}}
    for state, message in [
        ([1], "got list"),
        ({"fc/kernel": np.ones((2, 2)), "fc/kernel:0": np.ones((2, 2))}, "one name"),
    ]:
        with pytest.raises(ValueError, match=message):
            tools.from_keras(state, variables)


if importlib.util.find_spec("keras"):

    def keras_model():
        os.environ["KERAS_BACKEND"] = "jax"
        import keras
        from keras import layers

        return keras.Sequential(
            [
                layers.Input((8, 8, 3)),
                layers.SeparableConv2D(4, 3, depth_multiplier=2, name="sep"),
                layers.BatchNormalization(renorm=True, name="bn"),
                layers.DepthwiseConv2D(2, name="depth"),
                layers.Conv2DTranspose(4, 2, name="up"),
                layers.Dropout(0.5),
                layers.Conv2D(4, 2, name="conv"),
            ],
            name="net",
        )

    class Here(nn.Module):
        @nn.compact
        def __call__(self, x):
            valid = dict(padding="VALID")
            x = nn.Conv(6, (3, 3), feature_group_count=3, use_bias=False, name="sep_depth", **valid)(x)
            x = nn.Conv(4, (1, 1), name="sep_point")(x)
            x = bnjax.linen.BatchRenorm(use_running_average=True, epsilon=1e-3, name="bn")(x)
            x = nn.Conv(4, (2, 2), feature_group_count=4, name="depth", **valid)(x)
            x = nn.ConvTranspose(4, (2, 2), name="up", **valid)(x)
            return nn.Conv(4, (2, 2), name="conv", **valid)(x)

    @pytest.mark.filterwarnings("ignore:__array__ implementation")  # of Keras' own variables
    @pytest.mark.parametrize("form", ["model", "m.keras", "m.h5", "m.weights.h5"])
    def test_a_keras_model(tmp_path, form):
        """Checks square kernels: a model says which are transposed; for its files the Flax model is traced."""
        with jax.numpy_rank_promotion("allow"):
            there = keras_model()
            for w in there.weights:
                w.assign(RNG.uniform(0.5, 1.5, w.shape) if "variance" in w.path else RNG.normal(size=w.shape) / 3)
            x = RNG.normal(size=(2, 8, 8, 3)).astype(np.float32)
            wanted = np.asarray(there(x, training=False))
            if form != "model":
                (there.save_weights if "weights" in form else there.save)(tmp_path / form)
            state = there if form == "model" else tools.read_arrays(tmp_path / form)
        names = {"sep_depth": "sep", "sep_point": "sep"}
        blank = jax.eval_shape(Here().init, jax.random.key(0), x)
        options = {} if form == "model" else dict(apply_fn=Here().apply, x=x)
        prefix = "net" if form in ("model", "m.h5") else ""
        variables = tools.from_keras(state, blank, names=names, prefix=prefix, steps=1000, **options)
        np.testing.assert_allclose(Here().apply(variables, x), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
        traced = dict(apply_fn=Here().apply, x=x)
        back = tools.to_keras(variables, names=names, prefix="net", depthwise={"depth": 1, "sep_depth": 2}, **traced)
        assert {w.path for w in there.weights} - back.keys() == {
            f"net/bn/{word}" for word in ("moving_stddev", "renorm_mean", "renorm_stddev")
        }
        for w in there.weights:
            if w.path in back:
                np.testing.assert_array_equal(back[w.path], np.asarray(w.value), err_msg=w.path)
