"""Every property of the family over every row of variants.py. What one variant alone promises is in test_variants_own.

Value, running averages and derivative by the row's formula, in float64 and spread over devices; evaluation; dtypes; and
linen and nnx, which must be the functional variant with variables around it.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax
import modes
from cases import assert_close, by_name, tolerance
from variants import MOMENTUM, VARIANTS

# In float64: 2⁻⁵³ times the rows, and 1/ε where the variance of a virtual batch is as good as 0.
EXACT = 1e-9

rows = pytest.mark.parametrize("variant", VARIANTS, ids=str)
MASKED, SPREAD = by_name("masked_channels_first"), by_name("nan_in_padding")


def draw(variant, case, dtype=np.float32):
    """x, scale, bias, dy, mask, running: statistics that are neither at their start nor far from the batch's."""
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
    """By the formula, in float64: y, the running averages, and by autodiff of it the derivatives of Σ y·dy."""
    with jax.enable_x64(True):
        x, scale, bias, dy, mask, running = draw(variant, case, jnp.float64)

        def loss(x, scale, bias):
            y, mean, var = variant.formula(x, scale, bias, running, case.features, mask)
            return jnp.sum(y * dy), dict(y=y, mean=mean, var=var)

        (dx, dscale, dbias), out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(x, scale, bias)
        return jax.tree.map(np.asarray, out | dict(dx=dx, dscale=dscale, dbias=dbias))


def check(got, want, case, tol):
    """Sums of dy·xhat are right relative to the sum of their terms; means relative to the size of x."""
    size = 1 + abs(case.offset)
    terms = np.abs(case.arrays()[3]).sum() / case.feature_shape[-1] * (1 + np.max(np.abs(want["y"])))
    assert_close(got["y"], want["y"], tol, what="y")
    assert_close(got["dx"], want["dx"], 4 * tol, what="dx")
    assert_close(got["mean"], want["mean"], tol, size, "running mean")
    assert_close(got["var"], want["var"], 16 * tol, what="running var")
    for name in ("dscale", "dbias"):
        assert_close(got[name], want[name], tol, terms, name)


@pytest.mark.parametrize("name", ["two_features", "masked_channels_first", "float_weights"])
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
    """The output by `dtype` or promotion, the running averages float32 throughout, the derivatives as their arrays."""
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


class Linen:
    """A linen layer that holds its variables; `stats` and `params` by name."""

    def __init__(self, variant, case, **fields):
        self.module = getattr(bnjax.linen, variant.name)(axis=case.axis, momentum=MOMENTUM, **variant.fields, **fields)
        self.call = variant.call
        shape = tuple(n if a in case.features else 1 for a, n in enumerate(case.shape))  # one row
        x = 5 + jnp.zeros(shape)
        self.variables = self.module.init(jax.random.key(0), x, use_running_average=False, **self.call)

    def held(self):
        return dict(self.variables["batch_stats"]), dict(self.variables["params"])

    def load(self, stats, params):
        self.variables = dict(batch_stats=stats, params=params)

    def grad(self, x, dy, train, **options):
        """dx, the gradients of the parameters, and y, of Σ y·dy; training updates what it may."""

        @jax.jit
        def step(variables, x):
            def loss(x, params):
                held = variables | dict(params=params)
                y, updates = self.module.apply(held, x, not train, mutable=["batch_stats"], **self.call, **options)
                return jnp.sum(y * dy), (y, updates)

            return jax.grad(loss, (0, 1), has_aux=True)(x, variables["params"])

        (dx, grads), (y, updates) = step(self.variables, x)
        self.variables = self.variables | updates
        return dict(y=y, dx=dx, dscale=grads["scale"], dbias=grads["bias"])


class Nnx:
    """The same for nnx."""

    def __init__(self, variant, case, **fields):
        self.module = getattr(bnjax.nnx, variant.name)(
            case.feature_shape, axis=case.axis, momentum=MOMENTUM, **variant.fields, **fields, rngs=nnx.Rngs(0)
        )
        self.call = variant.call

    def held(self):
        return tuple({k: v[...] for k, v in nnx.state(self.module, t).items()} for t in (nnx.BatchStat, nnx.Param))

    def load(self, stats, params):
        nnx.update(self.module, {k: nnx.BatchStat(v) for k, v in stats.items()})
        nnx.update(self.module, {k: nnx.Param(v) for k, v in params.items()})

    def grad(self, x, dy, train, **options):
        @nnx.jit
        def step(module, x):
            def loss(module, x):
                y = module(x, not train, **self.call, **options)
                return jnp.sum(y * dy), y

            return nnx.grad(loss, argnums=(0, 1), has_aux=True)(module, x)

        (grads, dx), y = step(self.module, x)
        return dict(y=y, dx=dx, dscale=grads["scale"][...], dbias=grads["bias"][...])


def _layer(api, variant, case):
    """A layer with the drawn variables, and the batch."""
    x, scale, bias, dy, mask, running = draw(variant, case)
    layer = api(variant, case)
    layer.load({k: v for k, v in running._asdict().items() if v is not None}, dict(scale=scale, bias=bias))
    return layer, x, dy, mask


apis = pytest.mark.parametrize("api", [Linen, Nnx], ids=["linen", "nnx"])


@apis
@rows
def test_modules_start_as_batch_norm_does(api, variant):
    """linen by `init` on one row, which it does not average, under an axis that nobody has mapped yet."""
    layer = api(variant, MASKED, axis_name="data")
    stats, params = layer.held()
    zeros = dict.fromkeys(("mean", *(["steps"] if variant.steps else [])), 0)
    for held, start, lead in (
        (stats, zeros | dict(var=1), variant.lead),
        (params, dict(scale=1, bias=0), variant.affine_lead),
    ):
        assert held.keys() == start.keys()
        for name, value in start.items():
            np.testing.assert_array_equal(held[name], np.full(lead + MASKED.feature_shape, value, np.float32))
    assert isinstance(layer.module, bnjax.linen.BatchNorm if api is Linen else bnjax.nnx.BatchNorm)


@apis
@rows
def test_modules_train_as_the_formula_says(api, variant):
    layer, x, dy, mask = _layer(api, variant, MASKED)
    got = layer.grad(x, dy, train=True, mask=mask)
    check(got | layer.held()[0], wanted(variant, MASKED), MASKED, tolerance(MASKED))


@pytest.mark.parametrize(
    "options", [dict(train=False), dict(train=True, update_stats=False)], ids=["eval", "no update"]
)
@apis
@rows
def test_modules_keep_their_statistics(api, variant, options):
    layer, x, dy, mask = _layer(api, variant, MASKED)
    before = layer.held()
    y = layer.grad(x, dy, **options)["y"]
    jax.tree.map(np.testing.assert_array_equal, layer.held(), before)
    stats, params = before
    if not options["train"]:
        want = variant.evaluate(x, stats["mean"], stats["var"], params["scale"], params["bias"], axis=MASKED.axis)
        assert_close(y, want, tolerance(MASKED), what="y")
