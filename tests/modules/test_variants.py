"""Tests properties of all variants over every row of variants.py; test_variants_own.py has those of single variants.

Compares value, running averages and derivative with the row's formula, in float64 and split over devices; also
evaluation, dtypes, and the linen and nnx modules, which must agree with the function.
"""

from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
from tests.support import modes
from tests.support.cases import assert_close, by_name, tolerance
from tests.support.layers import LAYERS
from tests.support.variants import MOMENTUM, VARIANTS

# In float64: 2⁻⁵³ times the rows, and 1/ε where the variance of a virtual batch is nearly 0.
EXACT = 1e-9

rows = pytest.mark.parametrize("variant", VARIANTS, ids=str)
MASKED, SPREAD = by_name("masked_channels_first"), by_name("nan_in_padding")


def draw(variant, case, dtype=np.float32):
    """Draws x, scale, bias, dy, mask and running statistics, which are near those of the batch but not
    equal to them.
    """
    x, _, _, dy, mask = case.arrays()
    rng = np.random.default_rng(1)
    affine, stats = variant.affine_lead + case.feature_shape, variant.lead + case.feature_shape
    scale, bias = rng.uniform(0.5, 1.5, affine), rng.normal(size=affine)
    mean, var = case.offset + rng.normal(size=stats), rng.uniform(0.5, 2, stats)
    mean, var, scale, bias, x, dy = (jnp.asarray(v, dtype) for v in (mean, var, scale, bias, x, dy))
    steps = jnp.full(stats, 3, dtype) if variant.steps else None
    return x, scale, bias, dy, mask, bnjax.RunningStats(mean, var, steps)


@cache
def wanted(variant, case):
    """Computes y, running averages and derivatives of Σ y·dy by formula and autodiff, in float64."""
    with jax.enable_x64(True):
        x, scale, bias, dy, mask, running = draw(variant, case, jnp.float64)

        def loss(x, scale, bias):
            y, mean, var = variant.formula(x, scale, bias, running, case.features, mask)
            return jnp.sum(y * dy), dict(y=y, mean=mean, var=var)

        (dx, dscale, dbias), out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(x, scale, bias)
        return jax.tree.map(np.asarray, out | dict(dx=dx, dscale=dscale, dbias=dbias))


def check(got, want, case, tol):
    """Asserts that results agree: sums of dy·xhat relative to the sum of their terms, means relative to x."""
    size = 1 + abs(case.offset)
    terms = np.abs(case.arrays()[3]).sum() / case.feature_shape[-1] * (1 + np.max(np.abs(want["y"])))
    assert_close(got["y"], want["y"], tol, what="y")
    assert_close(got["dx"], want["dx"], 4 * tol, what="dx")
    assert_close(got["mean"], want["mean"], tol, size, "running mean")
    assert_close(got["var"], want["var"], 16 * tol, what="running var")
    for name in ("dscale", "dbias"):
        assert_close(got[name], want[name], tol, terms, name)


@pytest.mark.parametrize("name", ["two_features", "float_weights"])
@rows
def test_value_derivative_and_running_averages(variant, name):
    case = by_name(name)
    with jax.enable_x64(True):
        x, scale, bias, dy, mask, running = draw(variant, case, jnp.float64)

        def loss(x, scale, bias):
            y, new = variant.train(x, scale, bias, running, axis=case.axis, mask=mask)
            return jnp.sum(y * dy), dict(y=y, mean=new.mean, var=new.var)

        (dx, dscale, dbias), out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(x, scale, bias)
        check(out | dict(dx=dx, dscale=dscale, dbias=dbias), wanted(variant, case), case, EXACT)


@pytest.mark.slow
@rows
def test_transformed(variant):
    """Checks second derivatives by the formula, and that checkpoint and vmap change nothing."""
    case = by_name("two_features")
    with jax.enable_x64(True):
        x, scale, bias, dy, mask, running = draw(variant, case, jnp.float64)

        def train(x):
            return variant.train(x, scale, bias, running, axis=case.axis, mask=mask)[0]

        def formula(x):
            return variant.formula(x, scale, bias, running, case.features, mask)[0]

        def slope(f, x):
            return jax.grad(lambda x: jnp.sum(f(x) * dy))(x)

        def curvature(f):
            return jax.jvp(lambda x: jnp.sum(slope(f, x) * jnp.sin(x)), (x,), (dy,))[1]

        terms = float(jnp.sum(jnp.abs(dy)) * (1 + jnp.max(jnp.abs(slope(formula, x)))))
        assert_close(curvature(train), curvature(formula), EXACT, terms, "second derivative")
        assert_close(slope(jax.checkpoint(train), x), slope(train, x), EXACT, what="dx, rematerialised")
        several = jnp.stack([x, 2 * x[::-1]])
        wanted_y, wanted_dx = (jnp.stack([f(x) for x in several]) for f in (train, lambda x: slope(train, x)))
        assert_close(jax.vmap(train)(several), wanted_y, EXACT, what="y, mapped")
        assert_close(jax.vmap(lambda x: slope(train, x))(several), wanted_dx, EXACT, what="dx, mapped")


@pytest.mark.parametrize("mode", ["one_device", "jit", "shard_map_vma", "shard_map_no_vma", "vmap"])
@rows
def test_spread_over_devices(variant, mode):
    def train(*args, **options):
        y, running = variant.train(*args, **options)
        return y, dict(running=running)

    got = modes.flat(modes.MODES[mode](*draw(variant, SPREAD), train=train))
    got |= dict(mean=got["running.mean"], var=got["running.var"])
    check(got, wanted(variant, SPREAD), SPREAD, tolerance(SPREAD))


@rows
def test_evaluation(variant):
    x, scale, bias, _, _, running = draw(variant, MASKED)
    got = variant.evaluate(x, running.mean, running.var, scale, bias, axis=MASKED.axis)
    with jax.enable_x64(True):
        x, scale, bias, _, _, running = draw(variant, MASKED, jnp.float64)
        assert_close(
            got, variant.evaluation_formula(x, scale, bias, running, MASKED.features), tolerance(MASKED), what="y"
        )


@pytest.mark.parametrize(
    ("given", "dtype", "result"),
    [("bfloat16", None, "bfloat16"), ("float16", "float32", "float32"), ("float32", "bfloat16", "bfloat16")],
)
@rows
def test_dtypes(variant, given, dtype, result):
    """Checks that y has `dtype` or the promoted one, running averages are float32, and derivatives have the dtype of
    their argument.
    """
    x, scale, bias, _, mask, running = draw(variant, SPREAD)
    x, scale, bias = (v.astype(given) for v in (x, scale, bias))

    def loss(x, scale, bias):
        y, new = variant.train(x, scale, bias, running, mask=mask, dtype=dtype)
        return y.astype(jnp.float32).sum(), (y, new, variant.evaluate(x, *running[:2], scale, bias, dtype=dtype))

    grads, (y, new, evaluated) = jax.eval_shape(jax.grad(loss, (0, 1, 2), has_aux=True), x, scale, bias)
    assert y.dtype == evaluated.dtype == result
    assert {v.dtype.name for v in jax.tree.leaves(new)} == {"float32"}
    assert [g.dtype for g in grads] == [given] * 3


# Modules --------------------------------------------------------------------------------------------------------------

apis = pytest.mark.parametrize("api", LAYERS)


def _layer(api, variant, case, **fields):
    """Builds a layer from an input with one row."""
    shape = [n if a in case.features else 1 for a, n in enumerate(case.shape)]
    fields = dict(axis=case.axis, momentum=MOMENTUM) | variant.fields | fields
    return LAYERS[api](tuple(shape), variant.name, variant.call, **fields)


def _loaded(api, variant, case):
    """Returns a layer with the drawn variables, and the batch."""
    x, scale, bias, dy, mask, running = draw(variant, case)
    layer = _layer(api, variant, case)
    layer.load({k: v for k, v in running._asdict().items() if v is not None}, dict(scale=scale, bias=bias))
    return layer, x, dy, mask


@apis
@rows
def test_modules_start_as_batch_norm_does(api, variant):
    """Checks the initial variables; linen's `init` gets one row, does not average it, and needs no bound axis name."""
    layer = _layer(api, variant, MASKED, axis_name="data")
    stats = dict(mean=0, var=1) | (dict(steps=0) if variant.steps else {})
    starts = (layer.stats, stats, variant.lead), (layer.params, dict(scale=1, bias=0), variant.affine_lead)
    for held, start, lead in starts:
        assert held.keys() == start.keys()
        for name, value in start.items():
            np.testing.assert_array_equal(held[name], np.full(lead + MASKED.feature_shape, value, np.float32))
    assert isinstance(layer.module, getattr(bnjax, api).BatchNorm)


@apis
@rows
def test_modules_train_as_the_formula_says(api, variant):
    layer, x, dy, mask = _loaded(api, variant, MASKED)
    grads = layer.grad(lambda y: jnp.sum(y * dy), x, mask=mask, update_stats=False)
    dx = jax.grad(lambda x: jnp.sum(layer(x, mask=mask, update_stats=False) * dy))(x)
    y = layer(x, mask=mask)
    got = dict(y=y, dx=dx, dscale=grads["scale"], dbias=grads["bias"]) | layer.stats
    check(got, wanted(variant, MASKED), MASKED, tolerance(MASKED))


@apis
@rows
def test_modules_evaluate_by_what_they_hold(api, variant):
    """Checks evaluation with the stored variables, which stay unchanged there and with update_stats=False."""
    layer, x, _, _ = _loaded(api, variant, MASKED)
    stats, params = layer.stats, layer.params
    y = layer(x, use_running_average=True)
    layer(x, update_stats=False)
    chex.assert_trees_all_equal((layer.stats, layer.params), (stats, params))
    want = variant.evaluate(x, stats["mean"], stats["var"], params["scale"], params["bias"], axis=MASKED.axis)
    assert_close(y, want, tolerance(MASKED), what="y")


@apis
@rows
def test_no_nan_leaves_a_padded_position_in_evaluation(api, variant):
    """Checks that NaN and Inf in padding reach neither y elsewhere nor any gradient, in evaluation."""
    layer, x, dy, mask = _loaded(api, variant, MASKED)
    padding = np.broadcast_to(mask == 0, x.shape)
    spoiled = jnp.where(padding, np.where(np.arange(x.size).reshape(x.shape) % 2, np.nan, np.inf), x)
    evaluate = partial(layer, use_running_average=True, mask=mask)
    np.testing.assert_array_equal(evaluate(x), layer(x, use_running_average=True))
    y, dx = evaluate(spoiled), jax.grad(lambda x: jnp.sum(evaluate(x) * dy))(spoiled)
    dparams = layer.grad(lambda y: jnp.sum(y * dy), spoiled, use_running_average=True, mask=mask)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves((y, dx, dparams)))
    np.testing.assert_array_equal(y[~padding], evaluate(x)[~padding])
    assert not dx[padding].any()
