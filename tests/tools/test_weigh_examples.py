"""Tests evaluation in which examples count: the formula, what it promises of training batches, and what is refused."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax
from bnjax import tools
from tests.support import cases, zoo

UNIT, EPSILON = cases.unit("float32"), 1e-5
X = 3 + 2 * np.asarray(zoo.images(3)[:6])
STATS = dict(mean=np.float32([1.0, -2.0, 0.5]), var=np.float32([0.5, 2.0, 3.0]))


def weighed(x, stats, weight, mask=None):
    """Returns y by the formula in float64; x has the shape [N, ..., C]."""
    x = np.asarray(x, np.float64)
    mean, var = (np.asarray(stats[role], np.float64) for role in ("mean", "var"))
    y = []
    for i, example in enumerate(x):
        rows = example.reshape(-1, x.shape[-1])
        rows = rows if mask is None else rows[mask[i].ravel()]
        own, own_var = (rows.mean(0), rows.var(0)) if len(rows) else (mean, var)
        w = weight if len(rows) else 0
        mixed = (1 - w) * var + w * own_var + w * (1 - w) * (own - mean) ** 2
        y.append((example - (1 - w) * mean - w * own) / np.sqrt(mixed + EPSILON))
    return np.array(y)


def linen_layer(norm, x, stats):
    """Returns a layer as a function of variables and x, and its variables with these statistics."""
    norm = norm(use_running_average=True, use_scale=False, use_bias=False, epsilon=EPSILON)
    return norm.apply, {"batch_stats": stats}


@pytest.mark.parametrize("weight", [0, 0.25, 0.5, 1])
@pytest.mark.parametrize("norm", [bnjax.linen.BatchNorm, nn.BatchNorm])
def test_the_formula_in_linen(norm, weight):
    apply_fn, variables = linen_layer(norm, X, STATS)
    y = jax.jit(lambda x: tools.weigh_examples(apply_fn, variables, x, weight=weight))(X)
    cases.assert_close(y, weighed(X, STATS, weight), 64 * UNIT, 4)


@pytest.mark.parametrize("norm", zoo.nnx_norms())
def test_the_formula_in_nnx(norm):
    model = norm(3, use_running_average=False, epsilon=EPSILON, rngs=nnx.Rngs(0))
    model.mean[...], model.var[...] = STATS["mean"], STATS["var"]
    y = tools.weigh_examples(lambda m, x: m(x), model, X, weight=0.25)
    cases.assert_close(y, weighed(X, STATS, 0.25), 64 * UNIT, 4)
    np.testing.assert_array_equal(model.mean[...], STATS["mean"])


def test_scale_bias_axis_and_mask():
    """Checks another feature axis, masked positions (one example has no others), and that scale and bias come last."""
    mask = np.arange(36).reshape(6, 6) % 4 > 0
    mask = np.stack([mask, mask.T, ~mask, mask, mask, np.zeros_like(mask)])
    scale, bias = np.float32([2.0, -1.0, 0.5]), np.float32([1.0, 0.0, 3.0])
    norm = bnjax.linen.BatchNorm(use_running_average=True, axis=1)
    apply_fn = functools.partial(norm.apply, mask=mask[:, None])
    variables = {"params": dict(scale=scale, bias=bias), "batch_stats": STATS}
    y = tools.weigh_examples(apply_fn, variables, np.moveaxis(X, -1, 1), weight=0.5)
    cases.assert_close(np.moveaxis(y, 1, -1), weighed(X, STATS, 0.5, mask) * scale + bias, 64 * UNIT, 8)


@pytest.mark.parametrize("n", [2, 3])
def test_the_statistics_are_those_of_a_training_batch_on_average(n):
    """Checks the mean and variance over all batches of n that hold an example, the others drawn from 4."""
    population = np.asarray(zoo.images(5)[:4], np.float64) + np.arange(4).reshape(4, 1, 1, 1)
    picks = np.stack(np.meshgrid(*[range(4)] * n, indexing="ij"), -1).reshape(-1, n)
    batches = population[picks]  # [4^n, n, ...]
    means, variances = batches.mean((1, 2, 3)), batches.var((1, 2, 3))
    apply_fn, variables = linen_layer(
        bnjax.linen.BatchNorm, X, dict(mean=np.float32(means.mean(0)), var=np.float32(variances.mean(0)))
    )
    y = tools.weigh_examples(apply_fn, variables, np.float32(population), weight=1 / n)
    for i, example in enumerate(population):
        with_it = picks[:, 0] == i
        mean, var = means[with_it].mean(0), variances[with_it].mean(0)
        cases.assert_close(y[i], (example - mean) / np.sqrt(var + EPSILON), 64 * UNIT, 4)


def test_an_example_is_evaluated_alone():
    """Checks a network: nothing depends on the others in the batch, and a network that has only one row per example."""
    model, variables = zoo.linen_net()
    run = jax.jit(functools.partial(tools.weigh_examples, model.apply, variables, weight=0.5))
    together = run(X)
    alone = jnp.concatenate([run(x[None]) for x in X])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-4)
    assert np.abs(together - model.apply(variables, X)).max() > 0.01
    row = dict(mean=np.zeros(3, np.float32), var=np.ones(3, np.float32))
    apply_fn, variables = linen_layer(bnjax.linen.BatchNorm, X[:, 0, 0], row)
    y = tools.weigh_examples(apply_fn, variables, X[:, 0, 0], weight=0.5)
    cases.assert_close(y, weighed(X[:, 0, 0], row, 0.5), 64 * UNIT, 4)


def test_layers_that_are_not_named_evaluate_as_usual():
    model, variables = zoo.linen_net()
    first = tools.weigh_examples(model.apply, variables, X, weight=0.5, layers=["BatchNorm_0"])
    both = tools.weigh_examples(model.apply, variables, X, weight=0.5)
    plain = tools.weigh_examples(model.apply, variables, X, weight=0)
    np.testing.assert_allclose(plain, model.apply(variables, X), rtol=1e-4, atol=1e-4)
    assert np.abs(first - both).max() > 1e-3 and np.abs(first - plain).max() > 1e-3


def test_constant_statistics_and_bad_values():
    frozen = bnjax.linen.FrozenBatchNorm(use_running_average=True)
    variables = {**frozen.init(jax.random.key(0), X), "batch_stats": STATS}
    y = tools.weigh_examples(frozen.apply, variables, X, weight=1)
    np.testing.assert_array_equal(y, frozen.apply(variables, X))
    broken = X.copy()
    broken[1, 2, 2, 0] = np.nan
    apply_fn, variables = linen_layer(bnjax.linen.BatchNorm, X, STATS)
    y, wanted = tools.weigh_examples(apply_fn, variables, broken, weight=0.5), weighed(X, STATS, 0.5)
    alone = (broken[1, ..., 0] - np.float64(STATS["mean"][0])) / np.sqrt(STATS["var"][0] + EPSILON)
    wanted[1, ..., 0] = alone  # by the running averages
    cases.assert_close(np.nan_to_num(y), np.nan_to_num(wanted), 64 * UNIT, 4)


def test_a_layer_without_a_mean():
    """Checks that the example's quadratic mean counts and the mean stays 0."""
    norm = bnjax.linen.MovingAverageBatchNorm(use_running_average=True)
    variables = norm.init(jax.random.key(0), X)
    variables["batch_stats"] = dict(mean=np.zeros(3, np.float32), var=STATS["var"])
    y = tools.weigh_examples(norm.apply, variables, X, weight=0.25)
    square = 0.75 * STATS["var"] + 0.25 * (X**2).mean((1, 2))
    cases.assert_close(y, X / np.sqrt(square + EPSILON)[:, None, None], 64 * UNIT, 4)


@pytest.mark.parametrize("name", ["GhostBatchNorm", "BatchRenorm", "PowerNorm"])
def test_other_kinds_evaluate_as_usual_at_weight_zero(name):
    norm = getattr(bnjax.linen, name)(use_running_average=True, **dict(virtual_batch_size=2) if "Ghost" in name else {})
    variables = norm.init(jax.random.key(0), X)
    variables["batch_stats"] |= STATS if norm.keeps_mean else dict(var=STATS["var"])
    plain, half = (tools.weigh_examples(norm.apply, variables, X, weight=weight) for weight in (0, 0.5))
    cases.assert_close(plain, norm.apply(variables, X), 64 * UNIT, 8)
    assert np.abs(half - plain).max() > 0.1


def test_errors():
    apply_fn, variables = linen_layer(bnjax.linen.BatchNorm, X, STATS)
    for weight in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
            tools.weigh_examples(apply_fn, variables, X, weight=weight)
    with pytest.raises(ValueError, match="fits no layer"):
        tools.weigh_examples(apply_fn, {"batch_stats": {"a": STATS}}, X, weight=0.5, layers=["b"])
    first = bnjax.linen.BatchNorm(use_running_average=True, axis=0)
    with pytest.raises(ValueError, match="channels on the first axis"):
        tools.weigh_examples(first.apply, first.init(jax.random.key(0), X), X, weight=0.5)
    split = bnjax.linen.SplitBatchNorm(num_domains=2, use_running_average=True)
    apply_fn = functools.partial(split.apply, domain=0)
    with pytest.raises(ValueError, match="more than one set"):
        tools.weigh_examples(apply_fn, split.init(jax.random.key(0), X, domain=0), X, weight=0.5)
