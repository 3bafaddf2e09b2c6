"""Tests recalibrate: statistics of all rows at once, however they are batched, masked, sharded or lifted."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import bnjax
from bnjax import tools
from tests.support import cases, tools_in_two_processes, zoo
from tests.support.processes import run_two

pytestmark = pytest.mark.slow  # whole networks, traced and compiled many times

# Float32 layers between the input and a deep layer's statistics: some ten roundings of sums over at most 2^10 rows.
TOLERANCE = 100 * cases.unit("float32")


def linen_fn(model, **options):
    return functools.partial(model.apply, mutable=["batch_stats"], **options)


def momentum_zero(net, variables, x, norm=bnjax.linen.BatchNorm):
    """Returns the statistics of a training step with momentum 0, which are the moments of every layer's input."""
    model = net(norm=functools.partial(norm, momentum=0.0))
    return model.apply(variables, x, train=True, mutable=["batch_stats"])[1]["batch_stats"]


def close(actual, wanted, tolerance=TOLERANCE):
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    jax.tree.map(lambda a, w: cases.assert_close(a, w, tolerance, np.max(np.abs(w)) + 1), actual, wanted)


@pytest.mark.parametrize("norm", zoo.LINEN_NORMS)
@pytest.mark.parametrize("net", [zoo.ConvNet, zoo.Nested])
@pytest.mark.parametrize("layerwise", [False, True])
def test_one_batch_is_its_moments(norm, net, layerwise):
    """Checks that with one batch both ways are exact, in both modes of the model, through scan and vmap."""
    train = not layerwise
    x = zoo.images(1)
    model, variables = zoo.linen_net(net, norm=norm)
    result = tools.recalibrate(linen_fn(model, train=train), variables, [x], layerwise=layerwise, progress=False)
    zoo.assert_trees_equal(result["params"], variables["params"])
    close(result["batch_stats"], momentum_zero(net, variables, x))


@pytest.fixture
def data():
    """Returns uneven batches with different means; the last one is partial."""
    x = zoo.images(2, rows=22)
    x = x + jnp.repeat(jnp.arange(4.0), jnp.array([8, 8, 4, 2]))[:, None, None, None]
    return [x[:8], x[8:16], x[16:20], x[20:]]


def evaluated(apply_fn, variables, batches):
    """Returns the moments of every layer's input in evaluation: {layer: {mean, var}}."""
    moments = tools.collect_moments(apply_fn, variables, batches, progress=False)
    return {layer: {"mean": m.mean, "var": m.var} for layer, m in moments.items()}


@pytest.mark.parametrize("norm", zoo.LINEN_NORMS)
def test_layerwise_is_a_fixed_point(norm, data):
    """Checks that evaluation meets the stored statistics in all layers; after one pass, in the first only."""
    model, variables = zoo.linen_net(norm=norm)
    apply_fn = linen_fn(model)
    exact = tools.recalibrate(apply_fn, variables, data, layerwise=True, progress=False)
    close(exact["batch_stats"], evaluated(apply_fn, exact, data))
    one_pass = tools.recalibrate(apply_fn, variables, data, progress=False)
    met = evaluated(apply_fn, one_pass, data)
    close(one_pass["batch_stats"]["BatchNorm_0"], met["BatchNorm_0"])
    with pytest.raises(AssertionError):
        close(one_pass["batch_stats"]["BatchNorm_1"], met["BatchNorm_1"])


@pytest.mark.parametrize("norm", zoo.nnx_norms())
@pytest.mark.parametrize("layerwise", [False, True])
def test_nnx(norm, layerwise, data):
    """Checks that nnx gives the statistics of linen, in a new module, and leaves the given one unchanged."""
    model = zoo.nnx_net(norm)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    result = tools.recalibrate(lambda m, x: m(x), model, data, layerwise=layerwise, progress=False)
    zoo.assert_trees_equal(nnx.to_pure_dict(nnx.state(model)), before)
    assert type(result) is zoo.NnxNet
    assert type(result.norms[0]) is norm

    params = {f"Conv_{i}": before["convs"][i] for i in range(2)}
    params |= {f"BatchNorm_{i}": {k: before["norms"][i][k] for k in ("scale", "bias")} for i in range(2)}
    params |= {"LayerNorm_0": before["ln"], "Dense_0": before["head"]}
    stats = {f"BatchNorm_{i}": {k: before["norms"][i][k] for k in ("mean", "var")} for i in range(2)}
    variables = {"params": params, "batch_stats": stats}
    wanted = tools.recalibrate(linen_fn(zoo.ConvNet()), variables, data, layerwise=layerwise, progress=False)
    for i in range(2):
        actual = {k: getattr(result.norms[i], k)[...] for k in ("mean", "var")}
        close(actual, wanted["batch_stats"][f"BatchNorm_{i}"])


class Masked(nn.Module):
    """A network whose positions do not mix, so that masked ones can be removed for comparison."""

    norm: type = bnjax.linen.BatchNorm

    @nn.compact
    def __call__(self, x, mask=None, train=False):
        for _ in range(2):
            x = self.norm(use_running_average=not train)(nn.Dense(3)(x), mask=mask)
        return x


def test_masks_and_padding():
    """Checks padded batches of 7, 3, 1 and 0 rows, with NaN in the padding, against the rows alone."""
    x = jax.random.normal(jax.random.key(0), (4, 8, 3)) + jnp.arange(4.0)[:, None, None]
    counts = [7, 3, 1, 0]
    valid = [jnp.arange(8)[:, None] < n for n in counts]
    padded = [(jnp.where(v, b, jnp.nan), v) for b, v in zip(x, valid, strict=True)]
    model, variables = zoo.linen_net(Masked, x[0])
    result = tools.recalibrate(
        lambda v, batch: model.apply(v, *batch, mutable=["batch_stats"]), variables, padded, progress=False
    )
    rows = [b[:n] for b, n in zip(x, counts, strict=True) if n]
    close(result, tools.recalibrate(linen_fn(model), variables, rows, progress=False))
    first = np.concatenate(rows) @ np.asarray(variables["params"]["Dense_0"]["kernel"], np.float64)
    first = first + np.asarray(variables["params"]["Dense_0"]["bias"])
    close(result["batch_stats"]["BatchNorm_0"], {"mean": first.mean(0), "var": first.var(0)})


def test_counts():
    """Checks that counts are rows over all batches, and sums of weights with a mask."""
    x = jnp.ones((4, 5, 3))
    model, variables = zoo.linen_net(Masked, x)
    moments = tools.collect_moments(linen_fn(model), variables, [x, x[:1]], progress=False)
    weights = jnp.array([2.0, 0.0, 1.0, 0.5])[:, None, None]
    apply_fn = linen_fn(model, mask=weights)
    weighed = tools.collect_moments(apply_fn, variables, [x, x], progress=False)
    assert set(moments) == {"BatchNorm_0", "BatchNorm_1"}
    for layer in moments:
        np.testing.assert_array_equal(moments[layer].count, 25)
        np.testing.assert_array_equal(weighed[layer].count, 35)


def test_sharded(data):
    """Checks batches sharded by jit, and by shard_map over a named axis: the statistics are those of the
    whole batches.
    """
    model, variables = zoo.linen_net()
    wanted = tools.recalibrate(linen_fn(model), variables, data[:2], progress=False)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    sharded = [jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))) for x in data[:2]]
    close(tools.recalibrate(linen_fn(model), variables, sharded, progress=False), wanted)

    named = zoo.ConvNet(norm=functools.partial(bnjax.linen.BatchNorm, axis_name="data"))
    specs = dict(in_specs=(PartitionSpec(), PartitionSpec("data")), out_specs=(PartitionSpec("data"), PartitionSpec()))
    mapped = jax.shard_map(linen_fn(named, train=True), mesh=mesh, **specs)
    close(tools.recalibrate(mapped, variables, sharded, progress=False), wanted)

    # each device normalises its own rows, but the running averages are those of all devices
    alone = zoo.ConvNet(norm=functools.partial(bnjax.linen.BatchNorm, stats_axis_name="data"))
    mapped = jax.shard_map(linen_fn(alone, train=True), mesh=mesh, **specs)
    first = tools.recalibrate(mapped, variables, sharded, progress=False)["batch_stats"]["BatchNorm_0"]
    close(first, wanted["batch_stats"]["BatchNorm_0"])
    counts = tools.collect_moments(mapped, variables, sharded, progress=False)["BatchNorm_0"].count
    np.testing.assert_array_equal(counts, 16 * 6 * 6)


def test_two_processes(tmp_path):
    """Checks two real processes with two devices each against one process with all the data."""
    ranks = run_two(tools_in_two_processes.__name__, tmp_path)
    assert ranks[0].keys() == ranks[1].keys()
    for name, value in ranks[0].items():
        np.testing.assert_array_equal(value, ranks[1][name], err_msg=name)

    apply_fn, variables = tools_in_two_processes.model()
    whole = tools_in_two_processes.batches()
    wanted = {}
    for layerwise in (False, True):
        result = tools.recalibrate(apply_fn, variables, whole, layerwise=layerwise, progress=False)
        wanted |= tools_in_two_processes.flat(f"layerwise={layerwise}", result["batch_stats"])
        wanted[f"output/layerwise={layerwise}"] = apply_fn(result, whole[0])[0]
    for name, value in wanted.items():
        scale = np.max(np.abs(value)) + 1
        cases.assert_close(ranks[0][name], value, 10 * TOLERANCE if "output" in name else TOLERANCE, scale, name)
    # recalibrated apart and merged: exact in the first layer, whose input needs no other statistics
    for role in ("mean", "var"):
        layer = f"BatchNorm_0/{role}"
        merged, exact = ranks[0][f"merged/{layer}"], wanted[f"layerwise=True/{layer}"]
        cases.assert_close(merged, exact, TOLERANCE, np.max(np.abs(exact)) + 1, layer)


def test_a_layer_called_twice_pools_its_calls():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = bnjax.linen.BatchNorm(use_running_average=True)
            return norm(x[:5]), norm(x[5:] * 2)

    x = jax.random.normal(jax.random.key(0), (8, 3))
    model = Twice()
    variables = model.init(jax.random.key(0), x)
    result = tools.recalibrate(linen_fn(model), variables, [x], progress=False)
    rows = np.concatenate([x[:5], x[5:] * 2]).astype(np.float64)
    close(result["batch_stats"]["BatchNorm_0"], {"mean": rows.mean(0), "var": rows.var(0)})


def test_a_bad_batch_does_not_count(data):
    model, variables = zoo.linen_net()
    bad = data[0].at[0, 0, 0, 0].set(jnp.nan)
    wanted = tools.recalibrate(linen_fn(model), variables, data[1:], progress=False)
    zoo.assert_trees_equal(tools.recalibrate(linen_fn(model), variables, [*data[1:], bad], progress=False), wanted)
    with pytest.raises(ValueError, match=r"finite moments to some channels of \['BatchNorm_0', 'BatchNorm_1'\]"):
        tools.recalibrate(linen_fn(model), variables, [bad], progress=False)


def test_chosen_layers(data):
    """Checks that layers not chosen keep their statistics and evaluate with them."""
    model, variables = zoo.linen_net()
    apply_fn = linen_fn(model)
    result = tools.recalibrate(apply_fn, variables, data, layers=["BatchNorm_1"], progress=False)["batch_stats"]
    zoo.assert_trees_equal(result["BatchNorm_0"], variables["batch_stats"]["BatchNorm_0"])
    close(result["BatchNorm_1"], evaluated(apply_fn, variables, data)["BatchNorm_1"])


def test_averaged_weights(data):
    """Checks averaged weights (SWA), which evaluate as in training after recalibration."""
    model, one = zoo.linen_net()
    two = zoo.trained(one, 9)
    params = jax.tree.map(lambda a, b: (a + b) / 2, one["params"], two["params"])
    results = [
        tools.recalibrate(linen_fn(model), {**v, "params": params}, data[:1], progress=False) for v in (one, two)
    ]
    zoo.assert_trees_equal(*results)
    y, _ = model.apply(results[0], data[0], train=True, mutable=["batch_stats"])
    cases.assert_close(model.apply(results[0], data[0]), y, 10 * TOLERANCE)


def test_standing_statistics_of_a_generator():
    """Checks batches that are keys: the statistics are those of many latents."""
    model, variables = zoo.linen_net(Masked, jnp.ones((4, 3)))

    def generate(variables, key):
        return model.apply(variables, jax.random.normal(key, (64, 3)), mutable=["batch_stats"])

    keys = jax.random.split(jax.random.key(0), 4)
    result = tools.recalibrate(generate, variables, keys, progress=False)
    latents = np.concatenate([jax.random.normal(key, (64, 3)) for key in keys]).astype(np.float64)
    first = latents @ np.asarray(variables["params"]["Dense_0"]["kernel"])
    first = first + np.asarray(variables["params"]["Dense_0"]["bias"])
    close(result["batch_stats"]["BatchNorm_0"], {"mean": first.mean(0), "var": first.var(0)})


def test_from_a_checkpoint(data, tmp_path):
    model, variables = zoo.linen_net()
    restored = zoo.through_orbax(variables, tmp_path)
    results = [tools.recalibrate(linen_fn(model), v, data, progress=False) for v in (variables, restored)]
    zoo.assert_trees_equal(*results)
