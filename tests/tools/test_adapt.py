"""Tests adaptation: the papers' formulas, and that it improves predictions on a shifted test set."""

import functools

import flax.linen as nn
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


def apply_of(model):
    return functools.partial(model.apply, mutable=["batch_stats"])


@pytest.mark.parametrize("prior", [0, 1, 16, 1e30])
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_mixing_of_one_layer(prior, api):
    """Checks the paper's formula, with the n of the batch's first axis."""
    x, stats = zoo.images(3)[:8], dict(mean=np.float32([1.0, -2.0, 0.5]), var=np.float32([0.5, 2.0, 3.0]))
    if api == "linen":
        norm = bnjax.BatchNorm(use_running_average=True)
        variables = {**norm.init(jax.random.key(0), x), "batch_stats": stats}
        mixed = tools.adapt_statistics(apply_of(norm), variables, x, prior=prior)["batch_stats"]
    else:
        norm = bnjax.nnx.BatchNorm(3, use_running_average=True, rngs=nnx.Rngs(0))
        norm.mean[...], norm.var[...] = stats["mean"], stats["var"]
        new = tools.adapt_statistics(lambda m, x: m(x), norm, x, prior=prior)
        mixed = dict(mean=new.mean[...], var=new.var[...])
    wide = np.asarray(x, np.float64)
    for role, met in (("mean", wide.mean((0, 1, 2))), ("var", wide.var((0, 1, 2)))):
        wanted = (prior * np.float64(stats[role]) + len(x) * met) / (prior + len(x))
        cases.assert_close(mixed[role], wanted, 16 * UNIT, np.abs(stats[role]).max() + np.abs(met).max())


class Plain(nn.Module):
    """Normalises three times, with nothing in between."""

    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = bnjax.BatchNorm(use_running_average=True, epsilon=1e-12)(x)
        return x


def test_each_layer_meets_what_it_will_meet_in_evaluation():
    """Checks that one pass mixes: each layer sees the output of the mixed one before it."""
    x = (4 + 2 * np.random.default_rng(0).normal(size=(16, 1))).astype(np.float32)
    variables = Plain().init(jax.random.key(0), x)
    mixed = tools.adapt_statistics(apply_of(Plain()), variables, x, prior=16)
    y = Plain().apply(mixed, x)
    wanted = np.asarray(x, np.float64)
    for _ in range(3):
        mean, var = wanted.mean() / 2, (1 + wanted.var()) / 2  # half of each, of 16 samples and a prior of 16
        wanted = (wanted - mean) / np.sqrt(var)
    cases.assert_close(y, wanted, 64 * UNIT)


def test_a_channel_that_met_nothing_keeps_its_statistics():
    norm, x = bnjax.BatchNorm(use_running_average=True), np.ones((4, 3), np.float32)
    variables = norm.init(jax.random.key(0), x)
    x[0, 2] = np.nan
    mask = np.array([[True, False, True]])
    run = functools.partial(norm.apply, mask=mask, mutable=["batch_stats"])
    mixed = tools.adapt_statistics(run, variables, x, prior=0)["batch_stats"]
    np.testing.assert_array_equal(mixed["mean"], [1, 0, 0])
    np.testing.assert_array_equal(mixed["var"], [0, 1, 1])


class Small(nn.Module):
    """Two dense layers with normalizations, and a head."""

    @nn.compact
    def __call__(self, x, train=False):
        for width in (4, 6):
            x = nn.relu(bnjax.BatchNorm(use_running_average=not train)(nn.Dense(width)(x)))
        return nn.Dense(5)(x)


def rows(seed, n):
    return jax.random.normal(jax.random.key(seed), (n, 3))


def small():
    """Returns the small network with other values than the initial ones."""
    return Small(), zoo.trained(jax.eval_shape(Small().init, jax.random.key(0), rows(0, 2)))


def test_adaptation_undoes_a_shift_of_the_input():
    """Checks that with the target's statistics a change of contrast and brightness does not change the predictions."""
    model, variables = small()
    x = rows(4, 64)
    variables = tools.adapt_statistics(apply_of(model), variables, x, prior=0)
    shifted = 3 * x + 2  # a scale and shift of the first layer's output
    evaluate = jax.jit(model.apply)
    wanted, met = evaluate(variables, x), evaluate(variables, shifted)
    close = evaluate(tools.adapt_statistics(apply_of(model), variables, shifted, prior=0), shifted)
    assert np.abs(met - wanted).max() > 0.1
    assert np.abs(close - wanted).max() < 1e-3  # a higher contrast makes epsilon matter less


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(prior=-1), "must not be negative"),
        (dict(prior=1, samples=-2), "must not be negative"),
        (dict(prior=0, samples=0), "nor both zero"),
        (dict(prior=1, layers=["nowhere"]), "fits no layer"),
    ],
)
def test_mixing_errors(options, message):
    norm, x = bnjax.BatchNorm(use_running_average=True), jnp.ones((2, 3))
    variables = norm.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=message):
        tools.adapt_statistics(apply_of(norm), variables, x, **options)
    with pytest.raises(ValueError, match="samples must say how many"):
        tools.adapt_statistics(apply_of(norm), variables, {"a": x, "b": x[:1]}, prior=1)


def test_entropy():
    logits = jax.random.normal(jax.random.key(0), (3, 5, 7)) * 4
    p = np.exp(np.float64(logits))
    p /= p.sum(1, keepdims=True)
    entropy = jax.jit(tools.entropy, static_argnames="axis")
    np.testing.assert_allclose(entropy(logits, axis=1), -(p * np.log(p)).sum(1), atol=20 * UNIT)
    impossible = jnp.array([0.0, 0.0, -jnp.inf])
    value, slope = jax.jit(jax.value_and_grad(tools.entropy))(impossible)
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
    np.testing.assert_allclose(slope, 0, atol=1e-6)
    assert jax.eval_shape(tools.entropy, logits.astype(jnp.bfloat16)).dtype == jnp.float32


def test_tent_trains_scale_and_bias_alone():
    model, variables = small()
    params, stats = variables["params"], variables["batch_stats"]
    x = 2 * rows(5, 32) + 1
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
    def build():
        rngs = nnx.Rngs(0)
        return nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), norm(4, rngs=rngs), nnx.relu)

    graph, values = nnx.split(nnx.eval_shape(build))
    model = nnx.merge(graph, zoo.trained(values))
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    optimizer = tools.tent(optax.sgd(0.05), before, nnx.state(model, nnx.BatchStat))
    optimizer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
    optimizer.update(model, nnx.jit(nnx.grad(lambda m, x: tools.entropy(m(x)).mean()))(model, rows(5, 32)))
    for (keys, old), new in zip(
        jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(nnx.state(model, nnx.Param)), strict=True
    ):
        assert np.array_equal(old, new) == ("[0]" in jax.tree_util.keystr(keys)), keys


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
