"""Tests complex inputs: a complex mean and the real variance E|x − mean|², as in Flax, at the accuracy of
real inputs.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import bnjax
from experiments.bench.compiled import hlo
from tests.support.cases import assert_close

ROWS, CHANNELS = 32, 3
V = jnp.ones(CHANNELS)
REFUSED = {
    "batch_renorm": lambda x: bnjax.functional.batch_renorm(x, V, V),
    "power_norm": lambda x: bnjax.power_norm(x, V),
    "moving_average_batch_norm": lambda x: bnjax.moving_average_batch_norm(x, V),
    "PowerNorm": lambda x: bnjax.nnx.PowerNorm(CHANNELS, rngs=nnx.Rngs(0))(x),
}


@pytest.mark.parametrize("function", REFUSED.values(), ids=REFUSED)
def test_refused(function):
    with pytest.raises(TypeError, match=r"x must be real; got dtype complex64\. Normalise x\.real and x\.imag"):
        function(jnp.ones((4, CHANNELS), jnp.complex64))


def _draw():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape) + 1j * rng.normal(size=shape)  # noqa: E731
    x = draw(ROWS, CHANNELS) * 2 + 3 - 1j
    return x, draw(CHANNELS), draw(CHANNELS), draw(ROWS, CHANNELS), rng.random((ROWS, 1)) < 0.7


def _formula(x, scale, bias, mask=None, epsilon=1e-5):
    """Computes y, mean and var in plain jax.numpy."""
    w = jnp.broadcast_to(True if mask is None else mask, x.shape)
    mean = jnp.mean(x, 0, keepdims=True, where=w)
    deviation = x - mean
    var = jnp.mean(deviation.real**2 + deviation.imag**2, 0, keepdims=True, where=w)
    return deviation / jnp.sqrt(var + epsilon) * scale[None] + bias[None], mean[0], var[0]


def _close(mine, other, tolerance=1e-9):
    for a, b in zip(mine, other, strict=True):
        for part in (jnp.real, jnp.imag):
            assert_close(part(a), part(b), tolerance, 1 + np.max(np.abs(b)))


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0.0, 50 - 20j])
@pytest.mark.parametrize("masked", [False, True])
def test_value_and_derivatives_are_those_of_the_formula(masked, offset):
    with jax.enable_x64(True):
        *arguments, h, mask = map(jnp.asarray, _draw())
        arguments[0], mask = arguments[0] + offset, mask if masked else None

        def ours(x, scale, bias):
            y, moments = bnjax.batch_norm(x, scale, bias, mask=mask)
            return y, moments.mean, moments.var

        def theirs(*arguments):
            return _formula(*arguments, mask)

        def loss(f):
            return lambda *a: sum(jnp.sum(o * w).real for o, w in zip(f(*a), (h, h[0], h[1]), strict=True))

        tangents = [a[::-1] for a in arguments]
        _close(ours(*arguments), theirs(*arguments))
        _close(jax.grad(loss(ours), (0, 1, 2))(*arguments), jax.grad(loss(theirs), (0, 1, 2))(*arguments))
        _close(jax.jvp(ours, arguments, tangents)[1], jax.jvp(theirs, arguments, tangents)[1])
        slope = lambda f: jax.grad(lambda *a: jax.jvp(loss(f), a, tuple(tangents))[1])(*arguments)  # noqa: E731
        _close([slope(ours)], [slope(theirs)])


@pytest.mark.parametrize("param_dtype", [jnp.float64, jnp.complex128])
def test_the_modules_are_flaxs(param_dtype):
    """Compares value, running averages and evaluation of linen and nnx with Flax, from variables that Flax made."""
    with jax.enable_x64(True):
        x, scale, bias, _, mask = map(jnp.asarray, _draw())
        options = dict(momentum=0.9, param_dtype=param_dtype)
        flax = nn.BatchNorm(**options)
        variables = flax.init(jax.random.key(0), x, use_running_average=False)
        scale, bias = (v if param_dtype == jnp.complex128 else v.real for v in (scale, bias))
        variables = dict(variables, params=dict(scale=scale, bias=bias))

        def train_and_evaluate(module):
            run = dict(mask=mask, mutable=["batch_stats"])
            y, updates = module.apply(variables, x, use_running_average=False, **run)
            return y, updates["batch_stats"], module.apply(variables | updates, x, use_running_average=True)

        expected, stats, evaluated = train_and_evaluate(flax)
        y, own_stats, own_evaluated = train_and_evaluate(bnjax.linen.BatchNorm(**options))
        stats = jax.tree.map(
            lambda theirs, own: theirs.astype(own.dtype), stats, own_stats
        )  # averages keep their precision
        assert jnp.iscomplexobj(own_stats["mean"]) and not jnp.iscomplexobj(own_stats["var"])
        _close([y], [expected])
        _close([own_evaluated, *own_stats.values()], [evaluated, *stats.values()], 1e-6)

        norm = bnjax.nnx.BatchNorm(CHANNELS, rngs=nnx.Rngs(0), **options)
        norm.scale[...], norm.bias[...] = scale, bias
        y = norm(x, mask=mask)
        norm.eval()
        _close([y], [expected])
        _close([norm(x), norm.mean[...], norm.var[...]], [evaluated, stats["mean"], stats["var"]], 1e-6)


@pytest.mark.parametrize("check_vma", [True, False])
def test_one_all_reduce_each_way(check_vma):
    x = jnp.asarray(_draw()[0], jnp.complex64)
    mesh, data = Mesh(np.array(jax.devices()), ("data",)), P("data")
    options = dict(mesh=mesh, in_specs=(data, data), check_vma=check_vma)
    inside = lambda x: bnjax.batch_norm(x, axis_name="data")[0]  # noqa: E731
    forward = jax.jit(jax.shard_map(lambda x, dy: inside(x), out_specs=data, **options))
    backward = jax.jit(jax.shard_map(lambda x, dy: jax.vjp(inside, x)[1](dy)[0], out_specs=data, **options))
    dy = x[::-1] ** 2
    _close([forward(x, dy)], [inside_alone := bnjax.batch_norm(x)[0]], 1e-6)
    _close([backward(x, dy)], [jax.vjp(lambda x: bnjax.batch_norm(x)[0], x)[1](dy)[0]], 1e-6)
    assert inside_alone.dtype == jnp.complex64
    assert len(hlo.all_reduces(forward.lower(x, dy).compile())[0]) == 1
    assert len(hlo.all_reduces(backward.lower(x, dy).compile())[0]) == 2


@pytest.mark.parametrize("factor", [1e-10, 1e10, 1e30])
def test_any_size(factor):
    x = jnp.asarray(_draw()[0], jnp.complex64)
    y, _ = bnjax.batch_norm(x * factor, epsilon=3e-26)
    _close([y], [bnjax.batch_norm(x, epsilon=3e-26)[0]], 1e-5)


def test_variance_far_from_zero():
    """Checks the variance at |mean|/std = 1e4 in float32, where E|x|² − |E x|² has no digit left."""
    x = np.asarray(_draw()[0] + 2e4 * (1 + 1j), np.complex64)
    exact = x.astype(np.complex128)
    moments = bnjax.batch_moments(jnp.asarray(x))
    np.testing.assert_allclose(moments.var, exact.var(0), rtol=1e-5)
    np.testing.assert_allclose(moments.mean, exact.mean(0), rtol=1e-6)


def test_merged_and_pooled():
    x = jnp.asarray(_draw()[0], jnp.complex64)
    parts = [bnjax.batch_moments(part) for part in jnp.split(x, 4)]
    _close(bnjax.merge_moments(*parts), bnjax.batch_moments(x), 1e-6)
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *parts)
    pooled = jax.vmap(lambda m: bnjax.pool_moments(m, axis_name="part"), axis_name="part")(stacked)
    _close(jax.tree.map(lambda v: v[0], pooled), bnjax.batch_moments(x), 1e-6)


def test_bad_channel_leaves_running_averages_alone():
    x = jnp.asarray(_draw()[0], jnp.complex64).at[0, 1].set(complex(0, np.nan))
    running = bnjax.RunningStats(jnp.zeros(CHANNELS), V)
    after = bnjax.update_running(running, bnjax.batch_norm(x)[1], momentum=0.0)
    assert after.mean.dtype == jnp.complex64 and after.mean[1] == 0 and after.var[1] == 1
    np.testing.assert_allclose(after.mean[::2], x.mean(0)[::2], rtol=1e-5)


def test_the_variants_that_are_batch_norm_inside():
    x = jnp.asarray(_draw()[0], jnp.complex64)
    alone = lambda x: bnjax.batch_norm(x)[0]  # noqa: E731
    y, moments = bnjax.ghost_batch_norm(x, virtual_batch_size=8)
    _close([y], [jax.vmap(alone)(x.reshape(4, 8, CHANNELS)).reshape(x.shape)], 1e-6)
    _close(moments, bnjax.batch_moments(x), 1e-6)
    y, _ = bnjax.functional.split_batch_norm(x, 1, jnp.ones((2, CHANNELS)), jnp.zeros((2, CHANNELS)))
    _close([y], [alone(x)], 1e-6)
    mean, var, _ = bnjax.batch_moments(x)
    _close([bnjax.functional.frozen_batch_norm(x, mean, var)], [alone(x)], 1e-6)


def test_a_complex_vector_needs_a_complex_x():
    with pytest.raises(TypeError, match="scale must be numbers, and real ones unless x is complex"):
        bnjax.batch_norm(jnp.ones((4, CHANNELS)), V + 1j)
    with pytest.raises(TypeError, match=r"dtype .* must be complex where the input is complex64; got float32"):
        bnjax.batch_norm(jnp.ones((4, CHANNELS), jnp.complex64), dtype=jnp.float32)
