"""Tests scale and bias: given at the call, per channel or per example, with an offset, and zero at the start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
from tests.support import oracle
from tests.support.cases import assert_close, unit
from tests.support.layers import LAYERS

N, H, C = 4, 3, 5
SHAPE = (N, H, H, C)
NO_AFFINE = dict(use_scale=False, use_bias=False)
TOL = 40 * unit("float32")  # the sums over 36 rows and some ten operations


@pytest.fixture(params=LAYERS)
def layer(request):
    return lambda **fields: LAYERS[request.param](SHAPE, **fields)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) + 0.5


def xhat(x, features=(3,)):
    one = np.ones([x.shape[f] for f in features])
    return oracle.batch_norm(x, one, 0 * one, 0 * x, features).y


@pytest.mark.parametrize("shape", [(C,), (N, 1, 1, C), (N, 1, 1, 1), (1, H, H, 1), (N, H, H, C), (1, 1, 1, C)], ids=str)
@pytest.mark.parametrize("running", [False, True])
def test_given_at_the_call(layer, shape, running):
    """Checks scale and bias per channel, per example (conditional BN) and per position (SPADE)."""
    x, scale, bias = draw(*SHAPE), draw(*shape, seed=1), draw(*shape, seed=2)
    norm = layer(**NO_AFFINE)
    y = norm(x, scale=scale, bias=bias, use_running_average=running)
    want = x / np.sqrt(1 + 1e-5) if running else xhat(x)
    assert_close(y, want * scale + bias, TOL)
    assert not norm.params


@pytest.mark.parametrize("scale_shape", [None, (C,), (N, 1, 1, C)], ids=str)
@pytest.mark.parametrize("bias_shape", [None, (C,), (N, 1, 1, C)], ids=str)
def test_either_alone_or_of_two_shapes(layer, scale_shape, bias_shape):
    x = draw(*SHAPE)
    given = {k: draw(*s, seed=3) for k, s in dict(scale=scale_shape, bias=bias_shape).items() if s}
    y = layer(**NO_AFFINE)(x, **given)
    assert_close(y, xhat(x) * given.get("scale", 1) + given.get("bias", 0), TOL)


def test_an_own_scale_and_a_given_bias(layer):
    x, bias = draw(*SHAPE), draw(N, 1, 1, C, seed=1)
    norm = layer(use_bias=False)
    assert_close(norm(x, bias=bias), xhat(x) + bias, TOL)
    assert set(norm.params) == {"scale"}


def test_the_statistics_do_not_see_scale_and_bias(layer):
    x = draw(*SHAPE)
    plain, conditional = layer(**NO_AFFINE), layer(**NO_AFFINE)
    plain(x)
    conditional(x, scale=draw(N, 1, 1, C), bias=draw(N, 1, 1, C))
    for name, value in plain.stats.items():
        np.testing.assert_array_equal(conditional.stats[name], value)


def test_channels_first_and_several_feature_axes():
    for axis, features, shape in ((1, (1,), (N, 1, H)), ((1, 3), (1, 3), (H, C))):
        x, scale = draw(N, H, 4, C), draw(*((N, H, 1, 1) if axis == 1 else shape), seed=1)
        for api in LAYERS.values():
            norm = api(x.shape, axis=axis, **NO_AFFINE)
            spread = scale if scale.ndim == 4 else scale.reshape(1, H, 1, C)
            assert_close(norm(x, scale=scale), xhat(x, features) * spread, TOL)


def test_gradients_per_example(layer):
    """Checks dscale_n = Σ dy·xhat over the example, dbias_n = Σ dy, and dx for the cotangent dy·scale."""
    x, scale, bias, dy = draw(*SHAPE), draw(N, 1, 1, C, seed=1), draw(N, 1, 1, C, seed=2), draw(*SHAPE, seed=3)
    norm = layer(**NO_AFFINE)

    def loss(x, scale, bias):
        return jnp.sum(norm(x, scale=scale, bias=bias, update_stats=False) * dy)

    dx, dscale, dbias = jax.grad(loss, (0, 1, 2))(x, scale, bias)
    one = np.ones(C)
    want = oracle.batch_norm(x, one, 0 * one, dy * scale, (3,))
    size = np.abs(dy).sum((1, 2), keepdims=True) * np.max(np.abs(want.y))
    assert_close(dx, want.dx, 4 * TOL)
    assert_close(dscale, (dy * want.y).sum((1, 2), keepdims=True), TOL, size)
    assert_close(dbias, dy.sum((1, 2), keepdims=True), TOL, size)


def test_padding_stays_clean_with_a_given_scale(layer):
    x, mask = draw(*SHAPE), np.ones((N, 1, 1, 1), bool)
    x[1], mask[1] = np.nan, False
    y = layer(**NO_AFFINE)(x, mask=mask, scale=draw(N, 1, 1, C), bias=np.ones((N, 1, 1, C), np.float32))
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(y[1], np.ones((H, H, C)))


def test_bfloat16_is_rounded_once(layer):
    """Checks that xhat, scale and bias are applied in float32, and only the output is rounded."""
    x, scale, bias = (jnp.asarray(draw(*s), jnp.bfloat16) for s in (SHAPE, (N, 1, 1, C), (N, 1, 1, C)))
    norm = layer(**NO_AFFINE, dtype=jnp.bfloat16)
    y = norm(x, scale=scale, bias=bias)
    assert y.dtype == jnp.bfloat16
    x, scale, bias = (np.asarray(v, np.float64) for v in (x, scale, bias))
    want = xhat(x) * scale + bias
    assert_close(y, want, unit("bfloat16") + TOL, np.abs(want) + TOL * np.max(np.abs(want)) / unit("bfloat16"))


@pytest.mark.parametrize(
    "shape", [(N, C), (H, C), (C, 1), (2, 1, 1, C), (N, 1, 1, C + 1), (C + 1,), (), (1, N, 1, 1, C)]
)
@pytest.mark.parametrize("name", ["scale", "bias"])
def test_other_shapes_are_refused(layer, name, shape):
    with pytest.raises(ValueError, match=rf"{name} must be per channel"):
        layer(**NO_AFFINE)(draw(*SHAPE), **{name: np.ones(shape, np.float32)})


@pytest.mark.parametrize("name", ["scale", "bias"])
def test_a_parameter_that_would_have_no_effect_is_refused(layer, name):
    with pytest.raises(ValueError, match=f"use_{name}=False"):
        layer()(draw(*SHAPE), **{name: np.ones(C, np.float32)})


def test_scale_offset_starts_as_scale_init_says(layer):
    x = draw(*SHAPE)
    norm, plain = layer(scale_offset=1.0), layer()
    np.testing.assert_array_equal(norm.params["scale"], np.zeros(C))
    np.testing.assert_array_equal(norm(x), plain(x))
    start = layer(scale_offset=1.0, scale_init=lambda key, shape, dtype: jnp.full(shape, 0.25, dtype))
    np.testing.assert_array_equal(start.params["scale"], np.full(C, -0.75))
    assert_close(start(x), 0.25 * xhat(x), TOL)


def test_scale_offset_adds_to_a_given_scale_and_keeps_the_gradient(layer):
    """Checks y = xhat·(1 + gain), as in the generators of BigGAN, and the gradient of the gain."""
    x, gain = draw(*SHAPE), draw(N, 1, 1, C, seed=1)
    norm = layer(**NO_AFFINE, scale_offset=1.0)
    assert_close(norm(x, scale=gain), xhat(x) * (1 + gain), TOL)
    dy = draw(*SHAPE, seed=2)
    got = jax.grad(lambda g: jnp.sum(norm(x, scale=g, update_stats=False) * dy))(gain)
    terms = np.abs(dy * xhat(x)).sum((1, 2), keepdims=True)
    assert_close(got, (dy * xhat(x)).sum((1, 2), keepdims=True), TOL, terms)


def test_scale_offset_is_added_in_float32(layer):
    """Checks that 1 + 0.003 keeps the 0.003, which is lost if the sum is taken in bfloat16."""
    x, gain = draw(*SHAPE), jnp.full(C, 0.003, jnp.bfloat16)
    y = layer(**NO_AFFINE, scale_offset=1.0, dtype=jnp.float32)(x, scale=gain)
    assert_close(y, xhat(x) * (1 + float(gain[0])), TOL)


def test_scale_offset_without_a_scale_changes_nothing(layer):
    x = draw(*SHAPE)
    np.testing.assert_array_equal(layer(**NO_AFFINE, scale_offset=1.0)(x), layer(**NO_AFFINE)(x))


def test_a_zero_scale_gives_the_bias_and_learns(layer):
    """Checks a scale that starts at zero, as in the last norm of a residual branch (Goyal et al. 2017, section 5.1)."""
    x, dy = draw(*SHAPE), draw(*SHAPE, seed=1)
    norm = layer(scale_init=jax.nn.initializers.zeros)
    np.testing.assert_array_equal(norm(x), np.zeros(SHAPE))
    grads = norm.grad(lambda y: jnp.sum(y * dy), x)
    terms = np.abs(dy * xhat(x)).sum((0, 1, 2))
    assert_close(grads["scale"], (dy * xhat(x)).sum((0, 1, 2)), TOL, terms)
    assert np.abs(grads["scale"]).min() > 0.1
    dx = jax.grad(lambda x: jnp.sum(norm(x, update_stats=False) * dy))(x)
    np.testing.assert_array_equal(dx, np.zeros(SHAPE))


def test_ensembles_of_conditions_by_vmap():
    """Checks vmap over scale and bias with a shared x: one batch under several conditions."""
    x, scale = draw(*SHAPE), draw(3, C, seed=1)
    norm = bnjax.linen.BatchNorm(**NO_AFFINE, use_running_average=False)
    variables = norm.init(jax.random.key(0), x)
    y = jax.vmap(lambda s: norm.apply(variables, x, scale=s, update_stats=False))(scale)
    assert_close(y, xhat(x) * scale[:, None, None, None, :], TOL)
