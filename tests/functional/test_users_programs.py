"""Programs that users of other libraries wrote, each as its kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import jet
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax
from tests.support import naive, oracle
from tests.support.cases import assert_close, unit

SCALE, BIAS = np.float32([1.0, 2.0, 0.5]), np.float32([0.0, 1.0, -1.0])


def _batch(rows=16, offset=0.0, seed=0):
    return (np.random.default_rng(seed).normal(size=(rows, 3)) + offset).astype(np.float32)


def _training(x):
    return bnjax.batch_norm(x, SCALE, BIAS)[0]


def _evaluation(x):
    return bnjax.normalize(x, BIAS, SCALE, SCALE, BIAS)


def _linen(x):
    norm = bnjax.BatchNorm(use_running_average=False)
    variables = norm.init(jax.random.key(0), jnp.ones((1, 3)))
    return norm.apply(variables, x, mutable=["batch_stats"])[0]


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("offset", [0.0, 50.0])
@pytest.mark.parametrize("layer", [_training, _evaluation, _linen])
def test_taylor_mode(layer, offset, jitted):
    """`jet`, as physics-informed networks use it: the second derivative along a line, beside that of two jvps."""
    x, v = jnp.asarray(_batch(offset=offset)), jnp.asarray(_batch(seed=1))
    f = jax.jit(layer) if jitted else layer
    y, (first, second) = jet.jet(f, (x,), ((v, jnp.zeros_like(v)),))
    slope = lambda x: jax.jvp(layer, (x,), (v,))  # noqa: E731
    (want, want_first), (_, want_second) = jax.jvp(slope, (x,), (v,))
    for got, wanted in ((y, want), (first, want_first), (second, want_second)):
        assert_close(got, wanted, 1e-4, 1 + np.max(np.abs(wanted)))


MASKS = {
    "bool": np.arange(16)[:, None] < 10,
    "int": (np.arange(16)[:, None] < 10).astype(np.int32),
    "uint8": (np.arange(16)[:, None] < 10).astype(np.uint8),
    "float16": (np.arange(16)[:, None] < 10).astype(np.float16),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("mask", [None, *MASKS])
def test_strict_promotion(mask, dtype):
    x, weights = jnp.asarray(_batch(), dtype), None if mask is None else jnp.asarray(MASKS[mask])

    def everything(x):
        running = bnjax.RunningStats(jnp.zeros(3), jnp.ones(3))
        y, _, running = bnjax.batch_norm_step(x, running, SCALE, BIAS, mask=weights, dtype=dtype)
        evaluated = bnjax.batch_norm_step(x, running, SCALE, BIAS, use_running_average=True, mask=weights).y
        return jnp.sum(y.astype(jnp.float32)) + jnp.sum(evaluated.astype(jnp.float32)) + jnp.sum(running.var)

    with jax.numpy_dtype_promotion("standard"):
        want = jax.value_and_grad(everything)(x)
    with jax.numpy_dtype_promotion("strict"):
        got = jax.value_and_grad(everything)(x)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float64), np.asarray(b, np.float64))


@pytest.mark.parametrize("offset", [0.0, 50.0])
@pytest.mark.parametrize("where", [P(), P("model")])
def test_vectors_on_another_axis_of_an_explicit_mesh(where, offset):
    """A tensor-parallel hand-over: x split by rows, scale, bias and averages by channels."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    x = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32) + offset
    vectors = [np.linspace(0.5, 2, 8, dtype=np.float32) for _ in range(4)]

    def both(x, scale, bias, mean, var):
        running = bnjax.RunningStats(mean, var)
        y, _, running = bnjax.batch_norm_step(x, running, scale, bias, momentum=0.9)
        return y, running.mean, bnjax.batch_norm_step(x, running, scale, bias, use_running_average=True).y

    want = both(x, *vectors)
    with jax.set_mesh(mesh):
        split = [jax.device_put(v, NamedSharding(mesh, where)) for v in vectors]
        placed = jax.device_put(x, NamedSharding(mesh, P("data")))
        got = jax.jit(both)(placed, *split)
        slope = jax.jit(jax.grad(lambda x, *v: jnp.sum(both(x, *v)[0] ** 3)))(placed, *split)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, 1e-5, 1 + np.max(np.abs(b)))
    assert_close(slope, jax.grad(lambda x, *v: jnp.sum(both(x, *v)[0] ** 3))(x, *vectors), 1e-4, 10.0)


@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_gradient_outside_of_a_jitted_named_vmap(offset):
    x = jnp.asarray(_batch(offset=offset).reshape(2, 8, 3))
    layer = jax.jit(jax.vmap(lambda x: bnjax.batch_norm(x, SCALE, BIAS, axis_name="v")[0], axis_name="v"))
    want = jax.grad(lambda x: (naive.batch_norm(x, SCALE, BIAS, (1,)) ** 3).sum())(x.reshape(16, 3))
    assert_close(jax.grad(lambda x: (layer(x) ** 3).sum())(x).reshape(16, 3), want, 1e-3, 10.0)


@pytest.mark.parametrize("order", [1, -1])
def test_merging_does_not_depend_on_the_order(order):
    parts = [(1e4, 0.0, 1.0), (0.0, 1.0, 1e7), (-3.0, 2.0, 5.0)]
    moments = [bnjax.Moments(*(jnp.full(1, v) for v in part)) for part in parts]
    got = bnjax.merge_moments(*moments[::order])
    mean, var, count = np.array(parts).T
    want_mean = np.sum(mean * count) / count.sum()
    want_var = np.sum(count * (var + (mean - want_mean) ** 2)) / count.sum()
    assert_close(got.var, [want_var], 1e-6)
    assert_close(got.mean, [want_mean], 1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1.0, 1e20, 1e30, 1e36])
def test_weights_of_any_size(size):
    """Right, or NaN where float32 cannot hold the sum of the weights: never a finite wrong value."""
    x, w = _batch(offset=2.0), np.random.default_rng(1).random((16, 1)).astype(np.float32)
    want = oracle.batch_norm(x, np.ones(3), np.zeros(3), x, (1,), mask=w)
    y, moments = bnjax.batch_norm(x, mask=jnp.asarray(w * np.float32(size)))
    if np.isfinite(moments.var).all():
        assert_close(y, want.y, 1e-4)
        assert_close(moments.var, want.statistics.var, 1e-4)
    else:
        assert np.isnan(y).all()
        assert size > 1e30


@pytest.mark.parametrize("size", [1e13, 1e16, 1e19, 1e25, 1e30])
def test_derivatives_of_any_size(size):
    """Derivatives at values far from 1, relative to those at the same values divided by their size."""
    x, dy = _batch(), _batch(seed=1)
    wide = lambda f, x: jax.vjp(f, x)[1](jnp.asarray(dy))[0]  # noqa: E731
    layer = lambda x: bnjax.batch_norm(x, SCALE, BIAS, epsilon=1e-20)[0]  # noqa: E731
    want = wide(layer, jnp.asarray(x))
    assert_close(wide(layer, jnp.asarray(x * np.float32(size))) * size, want, 1e-4, np.max(np.abs(want)))
    tangent = jax.jvp(layer, (jnp.asarray(x * np.float32(size)),), (jnp.asarray(dy * np.float32(size)),))[1]
    want = jax.jvp(layer, (jnp.asarray(x),), (jnp.asarray(dy),))[1]
    assert_close(tangent, want, 1e-4, np.max(np.abs(want)))


def test_sums_that_overflow_give_nan_and_no_wrong_number():
    x = (_batch(rows=1000, offset=1e3) * np.float32(1e33)).astype(np.float32)
    want = oracle.batch_norm(x, np.ones(3), np.zeros(3), x, (1,))
    y, _ = bnjax.batch_norm(x)
    assert np.all(np.isnan(y) | (np.abs(y - want.y) < 1e-2))


def test_a_bfloat16_bias_has_its_gradient_summed_in_float32():
    rows = np.random.default_rng(0).normal(size=(8, 64, 3)).astype(np.float32)

    def loss(bias):
        layer = lambda x: bnjax.batch_norm(x, None, bias, axis_name="d", dtype=jnp.float32)[0]  # noqa: E731
        return jnp.sum(jax.vmap(layer, axis_name="d")(rows) * (1 + rows))

    got = jax.grad(loss)(jnp.zeros(3, jnp.bfloat16))
    want = (1 + rows.astype(np.float64)).sum((0, 1))
    assert_close(got.astype(jnp.float32), want, unit("bfloat16"), np.abs(want))
