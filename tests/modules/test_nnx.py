"""Tests that bnjax.nnx.BatchNorm can replace flax.nnx.BatchNorm: same interface and states, without its defects."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.errors import TraceContextError
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import bnjax
from tests.support import oracle
from tests.support.cases import CASES, assert_close, by_name, expected, tolerance, unit

C = 4
BATCHED, SHARED = P("data"), P()


def batch(rows=12, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, C)), jnp.float32) + 0.5


def ours(num_features=C, **fields):
    return bnjax.nnx.BatchNorm(num_features, **fields, rngs=nnx.Rngs(0))


def flaxs(num_features=C, **fields):
    return nnx.BatchNorm(num_features, **fields, rngs=nnx.Rngs(0))


def values(module, kind=nnx.BatchStat):
    return {k: np.asarray(v[...]) for k, v in nnx.state(module, kind).items()}


def one_update(x, momentum=0.99):
    """Returns running mean and var after one batch, from their initial values."""
    s = oracle.statistics(np.asarray(x), (1,))
    return oracle.update_running((np.zeros(C), np.ones(C)), s, momentum)


def check_one_update(stats, x, times=1):
    """Asserts that the statistics took exactly `times` steps: fails if a transformation repeats or drops an update."""
    s, running = oracle.statistics(np.asarray(x), (1,)), (np.zeros(C), np.ones(C))
    for _ in range(times):
        running = oracle.update_running(running, s, 0.99)
    for name, want in zip(("mean", "var"), running, strict=True):
        assert_close(stats[name], want, 30 * unit("float32"), what=name)


# The interface


@pytest.mark.parametrize("method", ["__init__", "__call__", "set_view"])
def test_arguments_are_those_of_flax_first(method):
    theirs = inspect.signature(getattr(nnx.BatchNorm, method)).parameters
    mine = list(inspect.signature(getattr(bnjax.nnx.BatchNorm, method)).parameters.values())
    for a, b in zip(mine, theirs.values(), strict=False):
        assert (a.name, a.kind) == (b.name, b.kind)
        assert a.default == b.default, a.name
    extra = mine[len(theirs) :]
    assert all(p.kind == p.KEYWORD_ONLY or method == "set_view" for p in extra)


@pytest.mark.parametrize("fields", [{}, dict(use_scale=False), dict(use_bias=False), dict(param_dtype=jnp.bfloat16)])
def test_variables_are_those_of_flax(fields):
    init = jax.nn.initializers.normal()
    fields |= dict(scale_init=init, bias_init=init, bias_metadata={"tag": "b"}, scale_metadata={"tag": "s"})
    a, b = nnx.state(ours(**fields)), nnx.state(flaxs(**fields))
    assert jax.tree.structure(a) == jax.tree.structure(b)  # names, variable types, metadata
    for mine, theirs in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)


def test_attributes_are_those_of_flax():
    missing = set(vars(flaxs())) - set(vars(ours()))
    assert not missing


@pytest.mark.parametrize("running", [False, True])
def test_states_load_both_ways(running):
    """Checks that a state trained by one library evaluates and trains to the same values in the other."""
    for first, second in ((ours, flaxs), (flaxs, ours)):
        a, b = first(), second()
        a(batch(seed=1))
        nnx.update(b, nnx.state(a))
        y, z = (m(batch(seed=2), use_running_average=running) for m in (a, b))
        assert_close(y, z, 60 * unit("float32"))
        for name, want in values(a).items():
            assert_close(values(b)[name], want, 60 * unit("float32"))


def test_train_eval_view_and_attributes():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norms = nnx.List([bnjax.nnx.BatchNorm(C, rngs=rngs) for _ in range(2)])

        def __call__(self, x):
            for norm in self.norms:
                x = norm(x)
            return x

    block, x = Block(nnx.Rngs(0)), batch()
    block.eval()
    assert_close(block(x), x / (1 + 1e-5), 8 * unit("float32"))
    block.train()
    assert not block.norms[0].use_running_average
    quiet = nnx.view(block, update_stats=False)
    quiet(x)
    assert (values(block.norms[0])["mean"] == 0).all()
    block.set_attributes(update_stats=False)
    block(x)
    assert (values(block.norms[0])["mean"] == 0).all()
    block.norms[0](x, update_stats=True)  # an argument of the call overrides the attribute
    assert (values(block.norms[0])["mean"] != 0).all()


def test_without_a_choice_of_statistics_the_error_says_so():
    with pytest.raises(ValueError, match="use_running_average must be given"):
        ours(use_running_average=None)(batch())


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("wrong", [C - 1, C + 1, 1])
def test_a_wrong_channel_count_is_refused(wrong, running):
    """Checks for an error where Flax, without scale and bias, broadcasts."""
    with pytest.raises(ValueError, match="num_features must be the size of the feature axes"):
        ours(wrong, use_scale=False, use_bias=False)(batch(), use_running_average=running)


def test_lists_give_a_graphdef_that_hashes():
    """Checks that axis_index_groups in lists can be hashed; Flax's layer cannot be a static argument of jit then."""
    module = ours([C], axis=[-1], axis_index_groups=[[0, 1], [2, 3]], axis_name=["data"])
    hash(nnx.graphdef(module))


# The values


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case(case):
    arrays = x, scale, bias, _, mask = case.arrays()
    want = expected(case, arrays)
    module = ours(case.feature_shape, axis=case.axis, momentum=0.9)
    module.scale[...], module.bias[...] = scale, bias
    y = module(jnp.asarray(x), mask=mask)
    old = np.zeros(case.feature_shape), np.ones(case.feature_shape)
    running = oracle.update_running(old, want.statistics, 0.9)
    tol, size = tolerance(case), 1 + abs(case.offset)
    assert y.dtype == jnp.promote_types(case.dtype, jnp.float32)
    assert_close(y, want.y, tol, what="y")
    assert_close(module.mean[...], running[0], tol, size, "mean")
    assert_close(module.var[...], running[1], 16 * tol, what="var")


def test_one_number_for_several_feature_axes():
    """Checks flat variables for several axes, as in Flax, which can only evaluate with them."""
    case = by_name("two_features")
    x = jnp.asarray(case.arrays()[0])
    flat, shaped, theirs = ours(15, axis=(1, 2)), ours((3, 5), axis=(1, 2)), flaxs(15, axis=(1, 2))
    np.testing.assert_array_equal(flat(x), shaped(x))
    np.testing.assert_array_equal(flat.mean[...].reshape(3, 5), shaped.mean[...])
    with pytest.raises(ValueError, match="broadcast"):
        theirs(x)
    nnx.update(theirs, nnx.state(flat))
    assert_close(flat(x, use_running_average=True), theirs(x, use_running_average=True), tolerance(case))


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("x_dtype", [jnp.bfloat16, jnp.float32, jnp.int32])
@pytest.mark.parametrize("affine", [True, False])
def test_output_dtype_is_that_of_flax(x_dtype, dtype, affine):
    fields = dict(dtype=dtype, use_scale=affine, use_bias=affine, param_dtype=jnp.bfloat16)
    x = (10 * batch()).astype(x_dtype)
    for running in (False, True):
        assert ours(**fields)(x, running).dtype == flaxs(**fields)(x, running).dtype


# Transformations


def test_jit():
    module, x = ours(), batch()
    y = nnx.jit(lambda m, x: m(x))(module, x)
    assert_close(y, ours()(x), 4 * unit("float32"))
    check_one_update(values(module), x)


def test_grad():
    module, x = ours(), batch()
    grads = nnx.grad(lambda m: jnp.sum(m(x) ** 3))(module)
    assert set(grads) == {"scale", "bias"}
    check_one_update(values(module), x)


def test_remat():
    module, x = ours(), batch()
    nnx.grad(lambda m: jnp.sum(nnx.remat(lambda m, x: m(x))(m, x) ** 3))(module)
    check_one_update(values(module), x)


def test_vmap_makes_an_ensemble():
    make = nnx.vmap(lambda key: bnjax.nnx.BatchNorm(C, rngs=nnx.Rngs(key)))
    module, xs = make(jax.random.split(jax.random.key(0), 3)), jnp.stack([batch(seed=i) for i in range(3)])
    assert module.mean.shape == (3, C)
    ys = nnx.vmap(lambda m, x: m(x))(module, xs)
    for i, x in enumerate(xs):
        check_one_update({k: v[i] for k, v in values(module).items()}, x)
        assert_close(ys[i], ours()(x), 8 * unit("float32"))


def test_scan_over_layers_and_over_steps():
    layers = nnx.vmap(lambda key: bnjax.nnx.BatchNorm(C, rngs=nnx.Rngs(key)))(jax.random.split(jax.random.key(0), 3))
    nnx.scan(lambda x, m: m(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(batch(), layers)
    check_one_update({k: v[0] for k, v in values(layers).items()}, batch())

    module, x = ours(), batch()
    states = nnx.StateAxes({...: nnx.Carry})
    nnx.scan(lambda m, x: m(x), in_axes=(states, 0), out_axes=0)(module, jnp.stack([x, x]))
    check_one_update(values(module), x, times=2)


def test_split_and_merge_in_jax_jit():
    x = batch()
    graphdef, state = nnx.split(ours())

    @jax.jit
    def step(state, x):
        module = nnx.merge(graphdef, state)
        module(x)
        return nnx.state(module)

    check_one_update(values(nnx.merge(graphdef, step(state, x))), x)


def test_shared_module_updates_twice_in_sequence():
    module, x = ours(), batch()
    module(x)
    module(x)
    check_one_update(values(module), x, times=2)


def test_axis_name_in_vmap():
    module, x = ours(axis_name="data"), batch()
    graphdef, state = nnx.split(module)

    def shard(x):
        module = nnx.merge(graphdef, state, copy=True)
        return module(x), nnx.state(module, nnx.BatchStat)

    y, stats = jax.vmap(shard, axis_name="data")(x.reshape(4, 3, C))
    assert_close(y.reshape(12, C), ours()(x), 8 * unit("float32"))
    check_one_update({k: v[...][2] for k, v in stats.items()}, x)


def test_training_with_an_optimizer():
    """Checks that nnx.Optimizer updates the parameters, and that a step updates the statistics once."""
    module, x = ours(), batch()
    optimizer = nnx.Optimizer(module, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer, x):
        grads = nnx.grad(lambda m: jnp.mean((m(x) - 1) ** 2))(module)
        optimizer.update(module, grads)

    step(module, optimizer, x)
    check_one_update(values(module), x)
    np.testing.assert_array_less(0, module.bias[...])


# Merged inside jax.grad, for which Flax raises an error


def merged_grad(module, x, copy):
    """Returns gradient and new statistics by jax.grad, of a module merged inside from state outside."""
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)

    def loss(params):
        module = nnx.merge(graphdef, params, rest, copy=copy)
        return jnp.sum(module(x) ** 3), nnx.state(module, nnx.BatchStat)

    return jax.grad(loss, has_aux=True)(params), rest


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_merge_inside_grad(transform):
    x = batch()
    for module in (flaxs(), ours()):  # whoever shares the variables from outside would not see the update
        with pytest.raises(TraceContextError):
            merged_grad(module, x, copy=False)
    module = ours()
    graphdef, state = nnx.split(module)
    (grads, stats), rest = transform(lambda state: merged_grad(nnx.merge(graphdef, state), x, copy=True))(state)
    check_one_update(values(stats), x)
    np.testing.assert_array_equal(rest["mean"][...], np.zeros(C))  # no tracer leaked
    want = nnx.grad(lambda m: jnp.sum(m(x) ** 3))(module)
    for name in ("scale", "bias"):
        assert_close(grads[name][...], want[name][...], 30 * unit("float32"), 30)
    nnx.update(module, stats)
    module(x)


def test_merge_inside_grad_of_a_module_called_twice():
    graphdef, params, rest = nnx.split(ours(), nnx.Param, ...)
    x = batch()

    def loss(params):
        module = nnx.merge(graphdef, params, rest, copy=True)
        return jnp.sum(module(x) ** 3) + jnp.sum(module(x)), nnx.state(module, nnx.BatchStat)

    check_one_update(values(jax.grad(loss, has_aux=True)(params)[1]), x, times=2)


@pytest.mark.parametrize("transform", [jax.grad, jax.jit, jax.checkpoint])
def test_a_captured_module_may_be_read_and_not_updated(transform):
    module, x = ours(), batch()
    transform(lambda x: jnp.sum(module(x, update_stats=False) ** 3))(x)
    transform(lambda x: jnp.sum(module(x, use_running_average=True) ** 3))(x)
    with pytest.raises(TraceContextError) as error:
        transform(lambda x: jnp.sum(module(x) ** 3))(x)
    assert "update_stats=False" in "".join(error.value.__notes__)
    np.testing.assert_array_equal(module.mean[...], np.zeros(C))


def test_variables_that_are_references():
    """Checks reference variables, which may be written inside jax.grad; Flax 0.12.8 fails there."""
    with nnx.var_defaults(ref=True):
        module = ours()
    x = batch()
    jax.grad(lambda x: jnp.sum(module(x) ** 3))(x)
    check_one_update(values(module), x)


# Defects of flax.nnx.BatchNorm, each demonstrated


def test_running_statistics_are_not_cast_down():
    """Checks that dtype=bfloat16 does not round the running mean; Flax rounds 100.4 to 100.5 before subtracting."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(256, C)) + 100, jnp.float32)
    for make, wrong in ((ours, False), (flaxs, True)):
        module = make(dtype=jnp.bfloat16)
        module.mean[...], module.var[...] = x.mean(0) + 0.25, x.var(0)
        y = np.asarray(module(x, use_running_average=True), np.float64)
        mean, var = (np.asarray(v[...], np.float64) for v in (module.mean, module.var))
        want = oracle.normalize(x, mean, var, np.ones(C), np.zeros(C), (1,))
        error = np.max(np.abs(y - want))
        if wrong:
            assert error > 0.1
        else:
            assert_close(y, want, unit("bfloat16") + 8 * unit("float32"))


def masked_on_devices(make, x, mask):
    graphdef, state = nnx.split(make(axis_name="data", momentum=0.0))

    def shard(x, mask):
        module = nnx.merge(graphdef, state, copy=True)
        module(x, mask=mask)
        return module.mean[...], module.var[...]

    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    specs = dict(in_specs=BATCHED, out_specs=SHARED)
    return jax.jit(jax.shard_map(shard, mesh=mesh, **specs))(x, mask)


def test_masked_means_of_devices_are_weighted_by_their_counts():
    x, valid = np.asarray(batch(16)), np.array([4, 4, 1, 1])
    mask = (np.arange(16) % 4 < valid.repeat(4))[:, None]
    want = oracle.statistics(x, (1,), mask)
    mean, var = masked_on_devices(ours, x, mask)
    assert_close(mean, want.mean, 40 * unit("float32"))
    assert_close(var, want.var, 40 * unit("float32"))
    assert np.max(np.abs(masked_on_devices(flaxs, x, mask)[0] - want.mean)) > 0.05


def test_an_empty_device_spoils_nothing():
    x, mask = np.asarray(batch(16)), (np.arange(16) >= 4)[:, None]
    assert_close(masked_on_devices(ours, x, mask)[0], oracle.statistics(x, (1,), mask).mean, 40 * unit("float32"))
    assert np.isnan(masked_on_devices(flaxs, x, mask)[0]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_bad_batch_leaves_no_trace(bad):
    x = batch()
    spoiled = x.at[3, 1].set(bad)
    module, theirs = ours(), flaxs()
    for m in (module, theirs):
        y = m(spoiled)
        assert np.isnan(y[:, 1]).any()  # it shows in the output
        m(x)
    assert np.isfinite(values(module)["mean"]).all()
    assert np.isnan(values(theirs)["var"][1])
    want = one_update(x)
    assert_close(values(module)["mean"][1], want[0][1], 30 * unit("float32"))


def test_padding_with_nan_does_not_reach_the_gradient():
    x, mask = batch().at[3].set(jnp.nan), jnp.ones((12, 1), bool).at[3].set(False)

    def grads(module):
        return nnx.grad(lambda m: jnp.sum(jnp.where(mask, m(x, mask=mask), 0) ** 3))(module)

    assert all(np.isfinite(g[...]).all() for g in grads(ours()).values())
    assert np.isnan(grads(flaxs())["scale"][...]).any()
