"""Tests adaptation: the papers' formulas, and that it improves predictions on a shifted test set."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bnjax
from bnjax import tools
from tests.support import cases, zoo

UNIT = cases.unit("float32")


def target(model, variables, x):
    apply_fn = functools.partial(model.apply, mutable=["batch_stats"])
    return tools.collect_moments(apply_fn, variables, [x], use_running_average=False, progress=False)


@pytest.mark.parametrize("prior", [0, 1, 16, 1e30])
@pytest.mark.parametrize("net", [zoo.ConvNet, zoo.Nested])
def test_mixing(prior, net, tmp_path):
    model, variables = zoo.linen_net(net)
    variables = zoo.through_orbax(variables, tmp_path)
    moments = target(model, variables, zoo.images(3))
    mixed = tools.adapt_statistics(variables, moments, prior=prior, samples=8)
    zoo.assert_trees_equal(mixed["params"], variables["params"])
    reached = tools.inspect(mixed, moments).rows
    for layer, m in moments.items():
        node, old = (
            functools.reduce(lambda t, k: t[k], layer.split("/"), t["batch_stats"]) for t in (mixed, variables)
        )
        for role in ("mean", "var"):
            wanted = (prior * np.float64(old[role]) + 8 * np.float64(getattr(m, role))) / (prior + 8)
            magnitude = np.abs(old[role]).max() + np.abs(getattr(m, role)).max()
            cases.assert_close(node[role], wanted, 4 * UNIT, magnitude)
    if prior == 0:
        assert all(row["mean_drift"] == row["var_drift"] == 0 for row in reached)


def test_a_channel_that_met_nothing_keeps_its_statistics():
    variables = {"bn": {"mean": jnp.array([1.0, 2.0, 3.0]), "var": jnp.ones(3)}}
    moments = {"bn": bnjax.Moments(jnp.array([5.0, 5.0, jnp.nan]), jnp.ones(3) * 3, jnp.array([4.0, 0.0, 4.0]))}
    mixed = tools.adapt_statistics(variables, moments, prior=0, samples=4)["bn"]
    np.testing.assert_array_equal(mixed["mean"], [5, 2, 3])
    np.testing.assert_array_equal(mixed["var"], [3, 1, 1])


def test_adaptation_undoes_a_shift_of_the_input():
    """Checks that with the target's statistics a change of contrast and brightness does not change the predictions."""
    model, variables = zoo.linen_net()
    x = zoo.images(4, rows=16)
    variables = tools.recalibrate(
        functools.partial(model.apply, mutable=["batch_stats"]), variables, [x], layerwise=True, progress=False
    )
    kernel = variables["params"]["Conv_0"]["kernel"]
    variables["params"]["Conv_0"]["kernel"] = kernel.at[jnp.array([0, 2])].set(0).at[:, jnp.array([0, 2])].set(0)
    variables = tools.adapt_statistics(variables, target(model, variables, x), prior=0, samples=16)
    shifted = 3 * x + 2  # a 1×1 kernel turns it into scale and shift of the first layer's output
    wanted, met = model.apply(variables, x), model.apply(variables, shifted)
    adapted = tools.adapt_statistics(variables, target(model, variables, shifted), prior=0, samples=16)
    close = model.apply(adapted, shifted)
    assert np.abs(met - wanted).max() > 0.1
    assert np.abs(close - wanted).max() < 1e-3  # a higher contrast makes epsilon matter less


@pytest.mark.parametrize(
    ("moments", "options", "message"),
    [
        ({}, dict(prior=1, samples=1), "must be those of the layers"),
        ({"bn": bnjax.Moments(*[jnp.ones(3)] * 3)}, dict(prior=1, samples=1), r"shape \(3,\), its statistics \(2,\)"),
        ({}, dict(prior=-1, samples=2), "must not be negative"),
        ({}, dict(prior=0, samples=0), "nor both zero"),
    ],
)
def test_mixing_errors(moments, options, message):
    with pytest.raises(ValueError, match=message):
        tools.adapt_statistics({"bn": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}, moments, **options)
    with pytest.raises(ValueError, match="holds no batch normalization"):
        tools.adapt_statistics({}, {}, prior=1, samples=1)


def test_entropy():
    logits = jax.random.normal(jax.random.key(0), (3, 5, 7)) * 4
    p = np.exp(np.float64(logits))
    p /= p.sum(1, keepdims=True)
    np.testing.assert_allclose(tools.entropy(logits, axis=1), -(p * np.log(p)).sum(1), atol=20 * UNIT)
    impossible = jnp.array([0.0, 0.0, -jnp.inf])
    np.testing.assert_allclose(tools.entropy(impossible), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(tools.entropy)(impossible), 0, atol=1e-6)
    assert tools.entropy(logits.astype(jnp.bfloat16)).dtype == jnp.float32


def test_tent_trains_scale_and_bias_alone():
    model, variables = zoo.linen_net()
    params, stats = variables["params"], variables["batch_stats"]
    x = 2 * zoo.images(5, rows=32) + 1
    optimizer = tools.tent(optax.sgd(0.05, momentum=0.9), params, stats)

    def loss(params):
        logits, _ = model.apply({"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"])
        return tools.entropy(logits).mean()

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, adapted, values = optimizer.init(params), params, []
    for _ in range(5):
        adapted, state, value = step(adapted, state)
        values.append(float(value))
    assert values == sorted(values, reverse=True)
    for name, old in params.items():
        for role, leaf in old.items():
            assert np.array_equal(leaf, adapted[name][role]) == (not name.startswith("BatchNorm")), (name, role)


@pytest.mark.parametrize("norm", zoo.nnx_norms())
def test_tent_for_nnx(norm):
    model = zoo.nnx_net(norm)
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    optimizer = tools.tent(optax.sgd(0.05), before, nnx.state(model, nnx.BatchStat))
    optimizer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
    x = zoo.images(5, rows=32)
    optimizer.update(model, nnx.grad(lambda m: tools.entropy(m(x)).mean())(model))
    for (keys, old), new in zip(
        jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(nnx.state(model, nnx.Param)), strict=True
    ):
        assert np.array_equal(old, new) == ("norms" not in jax.tree_util.keystr(keys)), keys


def test_tent_errors():
    stats = {"bn": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}
    with pytest.raises(ValueError, match="no layer of params has either"):
        tools.tent(optax.sgd(1.0), {"dense": {"kernel": jnp.ones((2, 2))}}, stats)
    with pytest.raises(ValueError, match="holds no batch normalization"):
        tools.tent(optax.sgd(1.0), {"dense": {"kernel": jnp.ones((2, 2))}}, {})


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_a_teacher_follows_in_all_leaves(momentum):
    _, teacher = zoo.linen_net(zoo.Nested)
    student = zoo.trained(teacher, 11)
    followed = jax.jit(tools.follow)(teacher, student, momentum=momentum)
    jax.tree.map(
        lambda new, t, s: cases.assert_close(
            new, momentum * np.float64(t) + (1 - momentum) * np.float64(s), 4 * UNIT, np.abs(t).max() + np.abs(s).max()
        ),
        followed,
        teacher,
        student,
    )


@pytest.mark.parametrize("norm", zoo.nnx_norms())
def test_an_nnx_teacher(norm):
    model = zoo.nnx_net(norm)
    student = nnx.state(model)
    teacher = zoo.trained(student, 3)
    for kind in (nnx.Param, nnx.BatchStat):
        followed = nnx.filter_state(tools.follow(teacher, student, momentum=0.0), kind)
        zoo.assert_trees_equal(nnx.to_pure_dict(followed), nnx.to_pure_dict(nnx.state(model, kind)))
    assert isinstance(tools.follow(zoo.nnx_net(norm), model), zoo.NnxNet)


def test_a_small_step_in_half_precision_is_rounded_once():
    teacher = {"bn": {"mean": jnp.ones(2, jnp.bfloat16), "var": jnp.ones(2, jnp.bfloat16)}, "step": jnp.array(1)}
    student = {"bn": {"mean": jnp.full(2, 3, jnp.bfloat16), "var": jnp.ones(2, jnp.bfloat16)}, "step": jnp.array(7)}
    followed = tools.follow(teacher, student, momentum=0.99)
    np.testing.assert_array_equal(followed["bn"]["mean"], jnp.asarray(1.02, jnp.bfloat16))
    assert followed["step"] == 7


def test_follow_errors():
    tree = {"bn": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}
    with pytest.raises(ValueError, match=r"differ in \['bn/mean', 'bn/var'\]"):
        tools.follow(tree, jax.tree.map(lambda a: jnp.zeros(3), tree))
    with pytest.raises(ValueError, match="weight of the OLD"):
        tools.follow(tree, tree, momentum=1.5)
    with pytest.raises(ValueError, match="holds no batch normalization"):
        tools.follow({}, {})
