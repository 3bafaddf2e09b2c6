"""Tests masked_norms on networks that pass no mask on, against float64 NumPy and against the valid rows alone."""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax
from bnjax import tools
from tests.support import zoo

TOLERANCE = 1e-5  # some ten roundings of float32, through three layers
ROWS = jnp.array([True] * 5 + [False] * 3)
WEIGHTS = jnp.array([1.0, 2.0, 0.5, 1.0, 3.0, 0.0, 0.0, 0.0])


def padded(x, value=jnp.nan):
    """Returns a batch of eight whose last three rows are padding."""
    return x.at[5:].set(value)


def of_valid_rows(x, weights):
    """Computes mean and variance of each channel in NumPy, in float64."""
    x, weights = np.asarray(x, np.float64), np.asarray(weights, np.float64)
    valid = weights > 0
    rows = x[valid].reshape(valid.sum(), -1, x.shape[-1])
    w = np.repeat(weights[valid][:, None], rows.shape[1], 1)[..., None] / (weights.sum() * rows.shape[1])
    mean = (w * rows).sum((0, 1))
    return mean, (w * (rows - mean) ** 2).sum((0, 1))


@contextlib.contextmanager
def inputs_recorded(into):
    """Keeps the input of each batch normalization by its name, as the network computes it."""

    def keep(method, args, kwargs, context):
        if isinstance(context.module, nn.BatchNorm) and context.method_name == "__call__":
            into.setdefault(context.module.name, args[0])
        return method(*args, **kwargs)

    with nn.intercept_methods(keep):
        yield


@pytest.mark.parametrize("weights", [ROWS, WEIGHTS], ids=["rows", "weights"])
@pytest.mark.parametrize("order", ["as an argument", "opened within", "opened around"])
def test_each_layer_of_linen_against_numpy(order, weights):
    """Checks the statistics of every layer by those of its own input."""
    model, variables = zoo.linen_net(norm=nn.BatchNorm)
    x, met = padded(zoo.images()), {}
    swapped = dict(momentum=0.0)
    contexts = {
        "as an argument": [tools.swapped_norms(mask=weights, **swapped)],
        "opened within": [tools.swapped_norms(**swapped), tools.masked_norms(weights)],
        "opened around": [tools.masked_norms(weights), tools.swapped_norms(**swapped)],
    }[order]
    with contextlib.ExitStack() as stack:
        for context in (inputs_recorded(met), *contexts):
            stack.enter_context(context)
        _, updates = model.apply(variables, x, train=True, mutable=["batch_stats"])
    assert met.keys() == updates["batch_stats"].keys() == {"BatchNorm_0", "BatchNorm_1"}
    for name, stats in updates["batch_stats"].items():
        mean, var = of_valid_rows(met[name], weights)
        np.testing.assert_allclose(stats["mean"], mean, atol=TOLERANCE)
        np.testing.assert_allclose(stats["var"], var, rtol=TOLERANCE)


def nnx_step(model, x, rows=None):
    """Runs a copy of a model once in training, within a mask if one is given; returns y and the statistics."""
    model = nnx.clone(model)
    model.train()
    with contextlib.nullcontext() if rows is None else tools.masked_norms(rows):
        y = model(x)
    return y, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


def close(actual, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=TOLERANCE), actual, wanted)


@pytest.mark.parametrize("jitted", [False, True])
def test_nnx_equals_its_valid_rows(jitted):
    model = tools.swap(zoo.nnx_net(nnx.BatchNorm))
    graph, state = nnx.split(model)

    def step(state, x, rows=None):
        return nnx_step(nnx.merge(graph, state), x, rows)

    step = jax.jit(step) if jitted else step
    wanted = step(state, zoo.images()[:5])
    y, stats = step(state, padded(zoo.images()), ROWS)
    close((y[:5], stats), wanted)
    y, stats = step(state, padded(zoo.images(), 9.0), ROWS)
    close((y[:5], stats), wanted)
    close(step(state, zoo.images()[:5]), wanted)  # nothing of the mask stays


def test_inside_scan_and_vmap():
    step = lambda x: model.apply(variables, x, train=True, mutable=["batch_stats"])  # noqa: E731
    x = jax.random.normal(jax.random.key(0), (8, 3))
    model, variables = zoo.linen_net(zoo.Nested, x, norm=nn.BatchNorm)

    @jax.jit
    def masked(x, rows):
        with tools.swapped_norms(mask=rows):
            return step(x)

    y, updates = masked(padded(x), ROWS)
    wanted, wanted_updates = step(x[:5])
    close((y[:5], updates), (wanted, wanted_updates))


def test_parts_with_different_counts():
    """Checks two parts that share their statistics, of which one holds one valid row."""
    model, variables = zoo.linen_net(norm=nn.BatchNorm)

    def part(x, rows):
        with tools.swapped_norms(axis_name="parts", mask=rows):
            return model.apply(variables, x, train=True, mutable=["batch_stats"])

    x = padded(zoo.images()).reshape(2, 4, 6, 6, 3)
    y, updates = jax.vmap(part, axis_name="parts", out_axes=(0, None))(x, ROWS.reshape(2, 4))
    wanted = model.apply(variables, zoo.images()[:5], train=True, mutable=["batch_stats"])
    close((y.reshape(8, -1)[:5], updates), wanted)


class Speech(nn.Module):
    """Halves the frames from layer to layer, and knows of no mask."""

    @nn.compact
    def __call__(self, x):
        for width in (4, 6):
            x = nn.Conv(width, (1,), strides=2)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=False, momentum=0.0)(x))
        return x


def test_a_function_of_the_input():
    x, frames = jax.random.normal(jax.random.key(0), (3, 16, 5)), jnp.array([16, 8, 4])
    variables = Speech().init(jax.random.key(1), x)

    def valid(x):
        return (jnp.arange(x.shape[1])[None] < frames[:, None] * x.shape[1] // 16)[..., None]

    with tools.swapped_norms(), tools.masked_norms(valid):
        _, updates = Speech().apply(variables, jnp.where(valid(x), x, 9.0), mutable=["batch_stats"])
    kernel, bias = (variables["params"]["Conv_0"][name] for name in ("kernel", "bias"))
    seen = np.concatenate([np.asarray(row, np.float64)[:n:2] for row, n in zip(x, frames, strict=True)])
    seen = seen @ np.asarray(kernel[0], np.float64) + np.asarray(bias, np.float64)
    np.testing.assert_allclose(updates["batch_stats"]["BatchNorm_0"]["mean"], seen.mean(0), atol=1e-6)
    np.testing.assert_allclose(updates["batch_stats"]["BatchNorm_0"]["var"], seen.var(0), rtol=1e-5)


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_recalibrate_sees_the_mask(library):
    x = zoo.images()
    if library == "linen":
        model, variables = zoo.linen_net(norm=nn.BatchNorm)
        run = lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"])  # noqa: E731
    else:
        variables, run = tools.swap(zoo.nnx_net(nnx.BatchNorm)), lambda m, x: m(x)

    def masked(v, x):
        with tools.masked_norms(ROWS):
            return run(v, x)

    found = tools.recalibrate(masked, variables, [padded(x, 9.0)], progress=False)
    wanted = tools.recalibrate(run, variables, [x[:5]], progress=False)
    if library == "nnx":
        found, wanted = (nnx.to_pure_dict(nnx.state(m, nnx.BatchStat)) for m in (found, wanted))
    close(found, wanted)


class NoMask(nn.Module):
    @nn.compact
    def __call__(self, x):
        self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:])
        self.variable("batch_stats", "var", jnp.ones, x.shape[-1:])
        return x


def linen_step(model, variables, x):
    return model.apply(variables, x, mutable=["batch_stats"])


LAYERS = nn.Sequential([NoMask()])
WRONG = {  # what the error says -> the mask, and a call within it
    r"mask \[7\] does not have the first axes of the x \[8, 6, 6, 4\]": (
        jnp.ones(7),
        lambda: linen_step(*zoo.linen_net(norm=nn.BatchNorm), zoo.images()),
    ),
    r"mask \[8, 3\] .* pass a function from x to its mask": (
        jnp.ones((8, 3)),
        lambda: bnjax.nnx.BatchNorm(3, rngs=nnx.Rngs(0))(jnp.ones((8, 3))),
    ),
    r"no batch normalization layer asked for the mask.*tools\.swap": (
        ROWS,
        lambda: zoo.nnx_net(nnx.BatchNorm)(zoo.images()),
    ),
    r"layers_0: the __call__ of NoMask takes no mask": (
        ROWS,
        lambda: linen_step(LAYERS, {"batch_stats": {"layers_0": {"mean": jnp.zeros(3), "var": jnp.ones(3)}}}, X),
    ),
}
X = jnp.ones((8, 3))


@pytest.mark.parametrize("message", WRONG)
def test_errors(message):
    mask, call = WRONG[message]
    with pytest.raises(ValueError, match=message), tools.masked_norms(mask):
        call()


def test_a_mask_of_the_model_stays():
    model, variables = zoo.linen_net()
    mine = ROWS[:, None, None, None]
    with tools.masked_norms(jnp.zeros(8)):
        found = model.apply(variables, zoo.images(), train=True, mask=mine, mutable=["batch_stats"])
    close(found, model.apply(variables, zoo.images(), train=True, mask=mine, mutable=["batch_stats"]))
