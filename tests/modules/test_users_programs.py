"""What users of the modules tried, each as its kind, through linen and nnx."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.errors import TraceContextError

import bnjax
from tests.support.cases import assert_close

KEY = jax.random.key(0)


def _batch(rows=16, offset=0.0):
    return (np.random.default_rng(0).normal(size=(rows, 3)) + offset).astype(np.float32)


FLAGS = [64, 1.0, "yes", np.array([True, False])]


@pytest.mark.parametrize("flag", FLAGS, ids=str)
def test_a_flag_that_is_no_bool_is_refused(flag):
    x = jnp.asarray(_batch())
    with pytest.raises((TypeError, ValueError), match="use_running_average must be True or False"):
        bnjax.BatchNorm(flag).init(KEY, x)
    with pytest.raises((TypeError, ValueError), match="use_running_average must be True or False"):
        bnjax.nnx.BatchNorm(3, rngs=nnx.Rngs(0))(x, use_running_average=flag)
    with pytest.raises((TypeError, ValueError), match="update_stats must be True or False"):
        bnjax.nnx.BatchNorm(3, rngs=nnx.Rngs(0))(x, update_stats=flag)


def test_the_number_of_channels_is_named():
    with pytest.raises(TypeError, match="num_features"):
        bnjax.BatchNorm(64).init(KEY, jnp.ones((2, 64)))


@pytest.mark.parametrize("flag", [True, np.True_, np.False_])
def test_bools_of_numpy_are_bools(flag):
    norm = bnjax.BatchNorm(use_running_average=flag)
    norm.init(KEY, jnp.ones((2, 3)))


def test_a_traced_mode_says_what_to_write():
    norm, x = bnjax.BatchNorm(), jnp.asarray(_batch())
    variables = norm.init(KEY, x, use_running_average=True)
    with pytest.raises(ValueError, match="use_running_average must be True or False when the call is traced"):
        jax.jit(lambda mode: norm.apply(variables, x, use_running_average=mode))(True)


@pytest.mark.parametrize("api", ["linen", "nnx"])
@pytest.mark.parametrize("update", [False, True])
def test_a_traced_update_works(api, update):
    x = jnp.asarray(_batch(offset=3.0))
    norm = bnjax.BatchNorm(use_running_average=False, momentum=0.0)
    variables = norm.init(KEY, x)

    def linen(update):
        return norm.apply(variables, x, update_stats=update, mutable=["batch_stats"])[1]["batch_stats"]["mean"]

    def in_nnx(update):
        module = bnjax.nnx.BatchNorm(3, momentum=0.0, rngs=nnx.Rngs(0))
        module(x, update_stats=update)
        return module.mean[...]

    mean = jax.jit(dict(linen=linen, nnx=in_nnx)[api])(update)
    assert_close(mean, x.mean(0) if update else np.zeros(3), 1e-5, 3.0)


def test_forgotten_collections_are_named():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return bnjax.BatchNorm(use_running_average=False, name="norm")(x)

    variables = Net().init(KEY, jnp.asarray(_batch()))
    with pytest.raises(ValueError, match=r'BatchNorm at norm .*mutable=\["batch_stats"\]'):
        Net().apply(variables, _batch())
    with pytest.raises(ValueError, match=r"BatchNorm at norm found no batch_stats"):
        Net().apply({"params": variables["params"]}, _batch())


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_averages_that_were_cast_down_go_on(api):
    """3,000 steps from variables in bfloat16, in which an average would stop at 3.6 where the batches have 5."""
    x = jnp.asarray(_batch(offset=5.0))
    if api == "linen":
        norm = bnjax.BatchNorm(use_running_average=False)
        variables = jax.tree.map(lambda v: v.astype(jnp.bfloat16), norm.init(KEY, x))
        stats = norm.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]

        def train(stats, _):
            return norm.apply({**variables, "batch_stats": stats}, x, mutable=["batch_stats"])[1]["batch_stats"], None

        mean = jax.lax.scan(train, stats, length=3000)[0]["mean"]
    else:
        module = bnjax.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
        nnx.update(module, jax.tree.map(lambda v: v.astype(jnp.bfloat16), nnx.state(module)))
        module(x)
        graph, state = nnx.split(module)

        def step(state, _):
            module = nnx.merge(graph, state)
            module(x)
            return nnx.state(module), None

        mean = nnx.merge(graph, jax.lax.scan(step, state, length=3000)[0]).mean[...]
    assert mean.dtype == jnp.float32
    assert_close(mean, np.asarray(x, np.float64).mean(0), 1e-5)


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_float64_keeps_float64_averages(api):
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 3)) + 1e6)
        if api == "linen":
            norm = bnjax.BatchNorm(use_running_average=False, momentum=0.0)
            variables = norm.init(KEY, x)
            stats = norm.apply(variables, x, mutable=["batch_stats"])[1]
            y = norm.clone(use_running_average=True).apply({**variables, **stats}, x)
        else:
            module = bnjax.nnx.BatchNorm(3, momentum=0.0, rngs=nnx.Rngs(0))
            module(x)
            y = module(x, use_running_average=True)
        want = (x - x.mean(0, keepdims=True)) / np.sqrt(x.var(0, keepdims=True) + 1e-5)
        assert_close(y, want, 1e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("api", ["linen", "nnx"])
@pytest.mark.filterwarnings("ignore:a batch of shape")
def test_one_row_leaves_the_variance_alone(api, unbiased, masked):
    rows = 4 if masked else 1
    mask = np.arange(rows)[:, None] == 0 if masked else None
    options = dict(momentum=0.5, unbiased_var=unbiased, count_skipped=True)
    if api == "linen":
        norm = bnjax.BatchNorm(use_running_average=False, **options)
        stats = norm.init(KEY, jnp.ones((rows, 3)))
        for k in range(20):
            stats = {**stats, **norm.apply(stats, _batch(rows, k), mask=mask, mutable=["batch_stats"])[1]}
        var, skipped = stats["batch_stats"]["var"], stats["batch_stats"]["skipped"]
    else:
        module = bnjax.nnx.BatchNorm(3, rngs=nnx.Rngs(0), **options)
        for k in range(20):
            module(_batch(rows, k), mask=mask)
        var, skipped = module.var[...], module.skipped[...]
    np.testing.assert_array_equal(var, np.ones(3))
    np.testing.assert_array_equal(skipped, np.full(3, 20))


def test_scale_offset_is_subtracted_inside_of_the_box():
    init = nn.with_partitioning(nn.initializers.ones, ("model",))
    variables = bnjax.BatchNorm(use_running_average=False, scale_offset=1.0, scale_init=init).init(
        KEY, jnp.ones((2, 3))
    )
    assert isinstance(variables["params"]["scale"], nn.Partitioned)
    np.testing.assert_array_equal(variables["params"]["scale"].value, np.zeros(3))
    init = nnx.with_metadata(nnx.initializers.ones, note="kept")
    module = bnjax.nnx.BatchNorm(3, scale_offset=1.0, scale_init=init, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(module.scale[...], np.zeros(3))
    assert module.scale.get_metadata("note") == "kept"


def test_complex_input_in_a_scan():
    module = bnjax.nnx.BatchNorm(3, stats_dtype=jnp.complex64, rngs=nnx.Rngs(0))
    graph, state = nnx.split(module)
    x = jnp.asarray(_batch() + 1j * _batch(offset=2.0))

    def step(state, _):
        module = nnx.merge(graph, state)
        y = module(x)
        return nnx.state(module), y

    state, _ = jax.lax.scan(step, state, length=3)
    assert nnx.merge(graph, state).mean.dtype == jnp.complex64


def test_tabulate_of_a_layer_that_is_called_again():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = bnjax.BatchNorm(use_running_average=False)
            return norm(norm(norm(x)))

    options = dict(compute_flops=True, compute_vjp_flops=True, show_repeated=True, console_kwargs={"width": 200})
    text = nn.tabulate(Block(), KEY, **options)(jnp.ones((4, 3)))
    assert "BatchNorm" in text
    assert "_statistics" not in text


def test_an_update_through_a_view_is_seen_or_refused():
    module = bnjax.nnx.BatchNorm(3, momentum=0.0, rngs=nnx.Rngs(0))
    view = nnx.view(module, use_running_average=False)
    view(jnp.asarray(_batch(offset=4.0)))
    assert_close(module.mean[...], np.full(3, 4.0), 0.2)
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def loss(params, copy):
        merged = nnx.merge(graph, params, rest, copy=copy)
        y = nnx.view(merged, use_running_average=False)(jnp.asarray(_batch(offset=8.0)))
        return (y**2).sum(), nnx.state(merged, nnx.BatchStat)

    with pytest.raises(TraceContextError) as caught:
        jax.grad(loss, has_aux=True)(params, False)
    assert any("copy=True" in note for note in caught.value.__notes__)
    _, state = jax.grad(loss, has_aux=True)(params, True)
    assert_close(state["mean"][...], np.full(3, 8.0), 0.2)
