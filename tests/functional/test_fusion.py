"""`activation` and `residual`: value, dtype and derivative of the separate operations, and less kept for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import bnjax
from experiments.bench.compiled import hlo
from tests.support.cases import assert_close, by_name, tolerance, unit

ENDINGS = {  # activation, dtype of the residual
    "residual": (None, "float32"),
    "relu": (jax.nn.relu, None),
    "relu, residual": (jax.nn.relu, "float32"),
    "silu, residual in bfloat16": (jax.nn.silu, "bfloat16"),
}


def _setup(case, residual):
    x, scale, bias, h, mask = case.arrays()
    r = None if residual is None else jnp.asarray(np.sin(3 * h), residual)
    return jnp.asarray(x), jnp.asarray(scale), jnp.asarray(bias), r, jnp.asarray(h), mask


def _batch_norm(case, mask, dtype):
    options = dict(axis=case.axis, mask=mask, dtype=dtype)
    return lambda x, scale, bias, **ending: bnjax.batch_norm(x, scale, bias, **options, **ending)[0]


def _normalize(case, mask, dtype):
    mean, var = jnp.full(case.feature_shape, case.offset), jnp.full(case.feature_shape, 1.5)
    options = dict(axis=case.axis, dtype=dtype)
    return lambda x, scale, bias, **ending: bnjax.normalize(x, mean, var, scale, bias, **options, **ending)


def _fused_and_separate(norm, activation):
    def fused(x, scale, bias, r):
        return norm(x, scale, bias, activation=activation, residual=r)

    def separate(x, scale, bias, r):
        y = norm(x, scale, bias)
        y = y if r is None else y + r
        return y if activation is None else activation(y)

    return fused, separate


def _gradients(f, args, h):
    present = tuple(i for i, a in enumerate(args) if a is not None)
    return jax.grad(lambda *a: jnp.sum(f(*a).astype(jnp.float32) * h), present)(*args)


def _same(case, dtype, actual, wanted, magnitude=1.0):
    """Equal but for the order of roundings, in the coarser of the dtypes."""
    coarse = max(unit(dtype or case.dtype), unit(wanted.dtype))
    size = magnitude * (1 + np.max(np.abs(np.asarray(wanted, np.float64)), initial=0))
    assert actual.dtype == wanted.dtype
    assert_close(actual, wanted, 4 * coarse + 4 * tolerance(case), size)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
@pytest.mark.parametrize("make", [_batch_norm, _normalize])
def test_value_and_dtype(make, ending, dtype):
    case = by_name("bfloat16")
    activation, residual = ending
    *args, _, mask = _setup(case, residual)
    fused, separate = _fused_and_separate(make(case, mask, dtype), activation)
    _same(case, dtype, fused(*args), separate(*args))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (_batch_norm, "nan_padding"),
        (_batch_norm, "bfloat16"),
        (_batch_norm, "offset"),
        (_normalize, "split_features"),
        (_normalize, "bfloat16"),
    ],
)
def test_gradient(make, name):
    case = by_name(name)
    *args, h, mask = _setup(case, "float32")
    fused, separate = _fused_and_separate(make(case, mask, None), jax.nn.silu)
    for actual, wanted in zip(_gradients(fused, args, h), _gradients(separate, args, h), strict=True):
        _same(case, None, actual, wanted, magnitude=1 + case.offset)


def test_forward_mode_and_second_order_in_float64():
    with jax.enable_x64(True):
        case = by_name("masked_positions")
        *args, h, mask = (jnp.asarray(a) for a in _setup(case, "float32"))
        args, h = [a.astype(jnp.float64) for a in args], h.astype(jnp.float64)
        v = [jnp.cos(5 * a) for a in args]
        results = []
        for f in _fused_and_separate(_batch_norm(case, mask, None), jax.nn.silu):
            gradient = jax.grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a)) * h), (0, 1, 2, 3))
            both = jax.jit(lambda f=f, g=gradient: (jax.jvp(f, args, v), jax.jvp(g, args, v)))
            results.append(both())
        jax.tree.map(lambda a, b: assert_close(a, b, 1e-11, 1 + np.max(np.abs(b))), *results)


def _kept(f, *args):
    """The dtypes of the arrays as large as x that eager reverse mode keeps."""
    _, pullback = jax.vjp(f, *args)
    return sorted(str(leaf.dtype) for leaf in jax.tree.leaves(pullback) if leaf.size >= args[0].size)


@pytest.mark.parametrize("activation", [jax.nn.relu, jax.nn.silu])
def test_the_derivative_keeps_no_more_than_that_of_the_layer_alone(activation):
    """And the residual, as it came: neither y, nor the sum, nor a float32 copy."""
    x, s = jnp.ones((64, 8, 8, 8), jnp.bfloat16), jnp.ones(8)
    r = x * 2
    train = lambda x, s, **e: bnjax.batch_norm(x, s, pivot=0.1 * s, dtype=x.dtype, **e)[0]  # noqa: E731
    evaluate = lambda x, s, **e: bnjax.normalize(x, s, s, s, dtype=x.dtype, **e)  # noqa: E731
    for f in (train, evaluate):
        alone = _kept(f, x, s)
        assert set(alone) == {"bfloat16"}
        assert _kept(lambda x, s, f=f: f(x, s, activation=activation), x, s) == alone
        fused = _kept(lambda x, s, r, f=f: f(x, s, activation=activation, residual=r), x, s, r)
        assert fused == [*alone, "bfloat16"]
        assert len(fused) < len(_kept(lambda x, s, r, f=f: activation(f(x, s) + r), x, s, r))


@pytest.mark.parametrize("check_vma", [True, False])
def test_still_one_all_reduce_each_way(check_vma):
    def loss(x, scale, bias):
        y, _ = bnjax.batch_norm(x, scale, bias, pivot=bias, axis_name="data", activation=jax.nn.silu, residual=x)
        return jnp.sum(jnp.sin(y))

    mapped = jax.shard_map(
        jax.grad(loss),
        mesh=Mesh(np.array(jax.devices()), ("data",)),
        in_specs=(P("data"), P(), P()),
        out_specs=P("data"),
        check_vma=check_vma,
    )
    x, v = jnp.ones((32, 3, 4)), jnp.ones(4)
    main, rare = hlo.all_reduces(jax.jit(mapped).lower(x, v, v).compile())
    assert len(main) == 2, main
    assert all(len(found) == 1 for found in rare.values()), rare


def _modules(**fields):
    linen, x = bnjax.linen.BatchNorm(**fields), jnp.ones((2, 3, 4))
    given = {k: jnp.ones(4) for k in ("scale", "bias") if fields.get(f"use_{k}") is False}
    variables = linen.init(jax.random.key(0), x, use_running_average=False, **given)
    module = bnjax.nnx.BatchNorm(4, **fields, rngs=nnx.Rngs(0))
    return {
        "linen": lambda *a, **k: linen.apply(variables, *a, **k, mutable=["batch_stats"])[0],
        "nnx": lambda *a, **k: module(*a, **k),
    }


@pytest.mark.parametrize("use_running_average", [True, False])
@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_modules(api, conditional, use_running_average):
    """Also with a scale and bias of each example, where the ending comes after the core."""
    rng = np.random.default_rng(0)
    x, r = (jnp.asarray(rng.normal(size=(6, 3, 4)), jnp.float32) for _ in range(2))
    fields = dict(use_scale=False, use_bias=False) if conditional else {}
    options = dict(use_running_average=use_running_average, update_stats=False)
    if conditional:
        options |= {k: jnp.asarray(rng.normal(size=(6, 1, 4)), jnp.float32) for k in ("scale", "bias")}
    fused = _modules(activation=jax.nn.relu, **fields)[api](x, residual=r, **options)
    wanted = jax.nn.relu(_modules(**fields)[api](x, **options) + r)
    assert_close(fused, wanted, 8 * unit("float32"), 1 + np.max(np.abs(wanted)))


@pytest.mark.parametrize("function", ["batch_norm", "normalize"])
def test_a_residual_of_another_shape(function):
    x, v = jnp.ones((4, 3)), jnp.ones(3)
    args = (x,) if function == "batch_norm" else (x, v, v)
    with pytest.raises(ValueError, match=r"residual .* must have the shape of x"):
        getattr(bnjax, function)(*args, residual=jnp.ones((1, 3)))
