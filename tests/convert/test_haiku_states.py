"""Tests Haiku's trees of parameters and state: other kinds of networks, counters and averages, and errors."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bnjax import tools
from tests.support import zoo


def test_between_libraries():
    """Checks the round trip PyTorch → bnjax → Haiku → bnjax → Keras, with layer normalization."""
    _, variables = zoo.linen_net()
    torch = tools.to_torch(variables)
    here = tools.from_torch(torch, zoo.trained(variables, 3))
    haiku = tools.to_haiku(here, *zoo.haiku_like(variables))
    there = tools.from_haiku(*haiku, zoo.trained(variables, 4))
    zoo.assert_trees_equal(there, variables)
    zoo.assert_trees_equal(tools.to_keras(there), tools.to_keras(variables))


@pytest.mark.parametrize("norm", zoo.nnx_norms())
def test_nnx(norm):
    """Checks an nnx module and its state, whose names are paths."""
    model = zoo.nnx_net(norm)
    pure = nnx.to_pure_dict(nnx.state(model))
    held = {f"{kind}/{i}": v for kind in ("convs", "norms") for i, v in pure[kind].items()}
    held |= {name: pure[name] for name in ("ln", "head")}
    roles = {name: {k: v for k, v in h.items() if k not in ("mean", "var")} for name, h in held.items()}
    stats = {name: {k: h[k] for k in ("mean", "var")} for name, h in held.items() if "mean" in h}
    converted = tools.to_haiku(model, *zoo.haiku_like({"params": roles, "batch_stats": stats}))
    assert converted[0]["norms/1"]["scale"].shape == (1, 1, 1, 6)
    filled = tools.from_haiku(*converted, zoo.trained(nnx.state(model), 5))
    zoo.assert_trees_equal(nnx.to_pure_dict(filled), nnx.to_pure_dict(nnx.state(model)))
    filled = tools.from_haiku(*converted, nnx.eval_shape(lambda: zoo.NnxNet(norm, nnx.Rngs(1))))
    assert type(filled) is zoo.NnxNet
    zoo.assert_trees_equal(nnx.state(filled), nnx.state(model))


def test_a_checkpoint(tmp_path):
    _, variables = zoo.linen_net()
    like, restored = zoo.haiku_like(variables), zoo.through_orbax(variables, tmp_path)
    converted = tools.to_haiku(restored, *like)
    zoo.assert_trees_equal(converted, tools.to_haiku(variables, *like))
    zoo.assert_trees_equal(tools.from_haiku(*converted, restored), restored)


def one_norm(steps=None, average=(1, 2)):
    """Returns the variables of a single layer, and Haiku's trees of it."""
    stats = {"mean": jnp.zeros(2), "var": jnp.ones(2)} | ({} if steps is None else {"steps": jnp.asarray(steps)})
    ema = {"average": np.zeros(average, "f4"), "hidden": np.zeros(average, "f4"), "counter": np.zeros((), "i4")}
    state = {f"bn/~/{kind}_ema": ema for kind in ("mean", "var")}
    return (
        {"params": {"bn": {"scale": jnp.ones(2)}}, "batch_stats": {"bn": stats}},
        {"bn": {"scale": ema["hidden"]}},
        state,
    )


def test_channels_that_skipped_a_batch():
    """Checks that Haiku's one counter for all channels preserves each channel's average."""
    variables, params, state = one_norm(steps=[3.0, 2.0])
    variables["batch_stats"]["bn"]["mean"] = jnp.array([1.0, 5.0])
    ema = tools.to_haiku(variables, params, state, decay_rate=0.5)[1]["bn/~/mean_ema"]
    assert ema["counter"] == 3
    np.testing.assert_array_equal(ema["hidden"] / (1 - 0.5**3), [[1.0, 5.0]])


def test_a_broken_variance():
    """Checks that a variance that rounding does not explain is an error."""
    like, params, state = one_norm()
    state = {name: {**ema, "average": np.full((1, 2), 3.0, "f4")} for name, ema in state.items()}
    state["bn/~/var_ema"]["average"] = np.array([[-1e-6, -1.0]], "f4")
    with pytest.raises(ValueError, match=r"1 of 2 channels of bn are not: mean \[3.\], var \[-1.\]"):
        tools.from_haiku(params, state, like)


def test_counters_as_they_start():
    variables, params, state = one_norm(steps=[0.0, 0.0])
    ema = tools.to_haiku(variables, params, state, decay_rate=0.0)[1]["bn/~/var_ema"]
    np.testing.assert_array_equal(ema["hidden"], 0)
    assert ema["counter"] == 0


def test_errors():
    variables, params, state = one_norm()
    spare = {**params, "fc": {"w": np.ones((2, 2))}}
    lacking = {"bn/~/mean_ema": state["bn/~/mean_ema"]}
    from_cases = [
        (spare, state, variables, {}, r"has \['fc/w'\] besides"),
        (params, lacking, variables, {}, r"lacks \['bn/~/var_ema/average'\]"),
        (params, one_norm(average=(1, 3))[2], variables, {}, r"average has shape \(1, 3\) in Flax's order of axes"),
        (params, state, variables, {"names": {"bm": "bn"}}, r"\['bm'\] are no modules"),
        (params, state, {}, {}, "holds no batch normalization"),
    ]
    for *given, options, message in from_cases:
        with pytest.raises(ValueError, match=message):
            tools.from_haiku(*given, **options)
    to_cases = [
        (variables, spare, state, {}, r"has \['fc/w'\] besides"),
        (variables, params, lacking, {}, r"lacks \['bn/~/var_ema/average'\]"),
        (
            variables,
            params,
            one_norm(average=(1, 3))[2],
            {},
            r"bn/mean has shape \(2,\); bn/~/mean_ema/average has \(1, 3",
        ),
        (one_norm([1.0, 1.0])[0], params, state, {}, "decay_rate is the weight of the OLD value.*got None"),
        (one_norm([1.0, 1.0])[0], params, state, {"decay_rate": 1.0}, r"in \[0, 1\); got 1.0"),
        ({"params": {}}, params, state, {}, "holds no batch normalization"),
    ]
    for *given, options, message in to_cases:
        with pytest.raises(ValueError, match=message):
            tools.to_haiku(*given, **options)
    with pytest.raises(ValueError, match="weight of the OLD value"):
        tools.fields_from_haiku(-0.1)
