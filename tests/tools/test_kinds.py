"""Tests the tools on every variant: recalibration gives the statistics it evaluates with, and it can be folded."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax
from bnjax import tools
from tests.support import cases, zoo

TOLERANCE = 100 * cases.unit("float32")  # some ten roundings of sums over at most 2^10 rows, as in recalibrate's tests
FIELDS = {
    "BatchNorm": {},
    "GhostBatchNorm": dict(virtual_batch_size=4),
    "BatchRenorm": {},
    "FrozenBatchNorm": {},
    "PowerNorm": {},
    "MovingAverageBatchNorm": {},
}
ABOUT_ZERO = ("PowerNorm", "MovingAverageBatchNorm")


def linen(name, **fields):
    return functools.partial(getattr(bnjax.linen, name), **FIELDS.get(name, {}), **fields)


class Two(nn.Module):
    """Two layers of one variant in linen; the first reads the input itself."""

    norm: type

    @nn.compact
    def __call__(self, x, train=False):
        x = self.norm(use_running_average=not train, name="first")(x)
        return self.norm(use_running_average=not train, name="second")(nn.relu(nn.Dense(3)(x)))


class NnxTwo(nnx.Module):
    """Two layers of one variant in nnx; the first reads the input itself."""

    def __init__(self, norm, rngs):
        self.first, self.second = norm(3, rngs=rngs), norm(3, rngs=rngs)
        self.dense = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.dense(self.first(x))))


def rows():
    return jax.random.normal(jax.random.key(0), (22, 3)) * jnp.array([[1.0, 2.0, 0.5]]) + jnp.array([[3.0, 0.0, -1.0]])


BATCHES = (slice(0, 8), slice(8, 16), slice(16, 20), slice(20, 22))  # uneven, the last one partial


def linen_two(name):
    model = Two(linen(name))
    variables = model.init(jax.random.key(0), rows())
    stats = zoo.trained(variables["batch_stats"])
    if name in ABOUT_ZERO:
        stats = {layer: {**held, "mean": jnp.zeros(3)} for layer, held in stats.items()}
    if name == "BatchRenorm" or "steps" in stats["first"]:
        stats = {layer: {**held, "steps": jnp.ones(3)} if "steps" in held else held for layer, held in stats.items()}
    apply_fn = functools.partial(model.apply, mutable=["batch_stats"])
    return apply_fn, {**zoo.trained(variables), "batch_stats": stats}


def population(name, x):
    """Returns the statistics that evaluation of this variant should use, in float64."""
    x = np.asarray(x, np.float64)
    if name in ABOUT_ZERO:
        return {"mean": np.zeros(3), "var": np.mean(x**2, 0)}
    return {"mean": x.mean(0), "var": x.var(0)}


def close(actual, wanted):
    for role in ("mean", "var"):
        cases.assert_close(actual[role], wanted[role], TOLERANCE, np.max(np.abs(wanted["var"])) + 10)


CHANGING = [name for name in FIELDS if name != "FrozenBatchNorm"]


@pytest.mark.parametrize("name", CHANGING)
def test_recalibrate_gives_each_kind_its_statistics(name):
    """Checks the first layer against the rows, and with `layerwise` the second against its input in evaluation."""
    apply_fn, variables = linen_two(name)
    x = rows()
    batches = [x[part] for part in BATCHES]
    one_pass = tools.recalibrate(apply_fn, variables, batches, progress=False)
    exact = tools.recalibrate(apply_fn, variables, batches, layerwise=True, progress=False)
    for result in (one_pass, exact):
        close(result["batch_stats"]["first"], population(name, x))
        assert jax.tree.structure(result) == jax.tree.structure(variables)
        rest = {k: v for k, v in result.items() if k != "batch_stats"}
        zoo.assert_trees_equal(rest, {k: v for k, v in variables.items() if k != "batch_stats"})

    def keep(module, method):  # what the second layer reads in evaluation
        return isinstance(module, nn.Dense) and method == "__call__"

    _, state = apply_fn(exact, x, capture_intermediates=keep, mutable=["intermediates"])
    read = nn.relu(state["intermediates"]["Dense_0"]["__call__"][0])
    close(exact["batch_stats"]["second"], population(name, read))


@pytest.mark.parametrize("name", CHANGING)
def test_nnx_recalibrates_alike(name):
    model = NnxTwo(functools.partial(getattr(bnjax.nnx, name), **FIELDS[name]), nnx.Rngs(0))
    x = rows()
    result = tools.recalibrate(lambda m, x: m(x), model, [x[part] for part in BATCHES], progress=False)
    close({role: getattr(result.first, role)[...] for role in ("mean", "var")}, population(name, x))
    np.testing.assert_array_equal(model.first.mean[...], 0)


def test_evaluation_after_recalibration_is_standardised():
    """Checks E[y²] = 1 for variants that keep E[x²]; with the plain variance it would be larger."""
    for name in ABOUT_ZERO:
        norm, x = linen(name)(use_running_average=True, use_scale=False, use_bias=False), rows()
        variables = norm.init(jax.random.key(0), x)
        apply_fn = functools.partial(norm.apply, mutable=["batch_stats"])
        y, _ = apply_fn(tools.recalibrate(apply_fn, variables, [x], progress=False), x)
        np.testing.assert_allclose(np.mean(np.square(y), 0), 1, rtol=1e-4)


class Mixed(nn.Module):
    """A frozen layer before one that is not."""

    @nn.compact
    def __call__(self, x, train=False):
        x = bnjax.linen.FrozenBatchNorm(name="frozen")(x)
        return bnjax.linen.BatchNorm(use_running_average=not train, name="free")(x)


@pytest.mark.parametrize("layerwise", [False, True])
def test_frozen_layers_keep_and_use_their_statistics(layerwise):
    model, x = Mixed(), rows()
    variables = zoo.trained(model.init(jax.random.key(0), x))
    apply_fn = functools.partial(model.apply, mutable=["batch_stats"])
    result = tools.recalibrate(apply_fn, variables, [x[:8], x[8:]], layerwise=layerwise, progress=False)
    zoo.assert_trees_equal(result["batch_stats"]["frozen"], variables["batch_stats"]["frozen"])
    stats, affine = variables["batch_stats"]["frozen"], variables["params"]["frozen"]
    y = bnjax.normalize(x, stats["mean"], stats["var"], affine["scale"], affine["bias"])
    close(result["batch_stats"]["free"], population("BatchNorm", y))
    met = tools.collect_moments(apply_fn, variables, [x], use_running_average=False, progress=False)
    close(met["frozen"]._asdict(), population("BatchNorm", x))  # looked at all the same


def test_only_frozen_layers():
    apply_fn, variables = linen_two("FrozenBatchNorm")
    for options in ({}, {"layerwise": True}, {"layers": ["second"]}):
        with pytest.raises(ValueError, match=r"are constants, as in FrozenBatchNorm: there is nothing to recalibrate"):
            tools.recalibrate(apply_fn, variables, [rows()], progress=False, **options)


def test_layers_with_domains_are_refused():
    norm = bnjax.linen.SplitBatchNorm(use_running_average=True, domain=0)
    variables = norm.init(jax.random.key(0), rows())
    with pytest.raises(ValueError, match=r"more than one set cannot be recalibrated"):
        tools.recalibrate(functools.partial(norm.apply, mutable=["batch_stats"]), variables, [rows()], progress=False)


# Folding --------------------------------------------------------------------------------------------------------------


def both_sides(norm):
    """Builds a network with one norm that the dense layer after it absorbs, and one for the layer before it."""
    return nn.Sequential([norm(), nn.Dense(4), nn.relu, nn.Dense(5, use_bias=False), norm(), nn.relu])


def check(model, variables, folded, x):
    y = model.apply(variables, x)
    for other in (model.apply(folded.variables, x), folded.apply_fn(folded.stripped, x)):
        np.testing.assert_allclose(other, y, atol=1e-5 * np.abs(y).max(), rtol=0)
    assert [pair.side for pair in folded.pairs] == ["next", "previous"]
    assert folded.left == {}
    assert "rsqrt" not in str(jax.make_jaxpr(folded.apply_fn)(folded.stripped, x))
    assert set(folded.stripped) == {"params"}


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("fields", [{}, {"use_scale": False}, {"use_scale": False, "use_bias": False}])
def test_each_kind_folds(name, fields):
    model, x = both_sides(linen(name, use_running_average=True, **fields)), rows()
    variables = zoo.trained(model.init(jax.random.key(1), x))
    check(model, variables, tools.fold(model.apply, variables, x), x)


def test_frozen_layers_fold_in_training_mode_too():
    model, x = both_sides(linen("FrozenBatchNorm", use_running_average=False)), rows()
    variables = zoo.trained(model.init(jax.random.key(1), x))
    check(model, variables, tools.fold(model.apply, variables, x), x)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("domain", [0, 1])
@pytest.mark.parametrize("at_the_call", [False, True])
def test_one_domain_folds(shared, domain, at_the_call):
    """Checks that the folded network is that of one domain, whichever domain is given to it."""
    own = {} if at_the_call else {"domain": domain}
    split = functools.partial(bnjax.linen.SplitBatchNorm, use_running_average=True, shared_affine=shared, **own)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, domain=None):
            x = nn.relu(nn.Dense(4)(split()(x, domain=domain)))
            return split()(nn.Dense(5, use_bias=False)(x), domain=domain)

    net, x, here = Net(), rows(), domain if at_the_call else None
    variables = zoo.trained(net.init(jax.random.key(1), x, here))
    folded = tools.fold(functools.partial(net.apply, domain=here), variables, x)
    y = net.apply(variables, x, here)
    close_to = functools.partial(np.testing.assert_allclose, desired=y, atol=1e-5 * np.abs(y).max(), rtol=0)
    close_to(folded.apply_fn(folded.stripped, x))
    for other in (0, 1) if at_the_call else (None,):
        close_to(net.apply(folded.variables, x, other))
    assert [pair.side for pair in folded.pairs] == ["next", "previous"]
    assert set(folded.stripped) == {"params"}


def test_a_domain_that_nothing_takes_keeps_the_others():
    """Checks a norm before a layer without bias, which cannot be folded in place: all domains stay unchanged."""
    split = bnjax.linen.SplitBatchNorm(use_running_average=True, domain=1)
    model, x = nn.Sequential([split, nn.Dense(4, use_bias=False)]), rows()
    variables = zoo.trained(model.init(jax.random.key(1), x))
    folded = tools.fold(model.apply, variables, x)
    zoo.assert_trees_equal(folded.variables, variables)
    np.testing.assert_allclose(folded.apply_fn(folded.stripped, x), model.apply(variables, x), atol=1e-5)


def test_a_traced_domain_is_left():

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, domain):
            return bnjax.linen.SplitBatchNorm(use_running_average=True)(nn.Dense(4)(x), domain=domain)

    net, batch = Net(), (rows(), jnp.int32(1))
    variables = net.init(jax.random.key(0), *batch)
    folded = tools.fold(lambda v, batch: net.apply(v, *batch), variables, batch)
    assert folded.pairs == ()
    assert folded.left == {"SplitBatchNorm_0": "its domain is not known before the model runs"}


class BatchNorm(nn.Module):
    """A user's own class named BatchNorm, which evaluates differently."""

    use_running_average: bool = True
    axis: int = -1
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x):
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:])
        var = self.variable("batch_stats", "var", jnp.ones, x.shape[-1:])
        return 2 * bnjax.normalize(x, mean.value, var.value, epsilon=self.epsilon)


def test_a_stranger_of_the_same_name_is_left():
    model, x = nn.Sequential([nn.Dense(4), BatchNorm()]), rows()
    variables = zoo.trained(model.init(jax.random.key(1), x))
    assert "does not say what it computes with them" in tools.fold(model.apply, variables, x).left["layers_1"]


NNX_FIELDS = {**FIELDS, "SplitBatchNorm": dict(domain=1)}


@pytest.mark.parametrize("name", NNX_FIELDS)
def test_each_nnx_kind_folds(name):
    model = NnxTwo(functools.partial(getattr(bnjax.nnx, name), **NNX_FIELDS[name]), nnx.Rngs(0))
    graph, state = nnx.split(model)
    model = nnx.merge(graph, zoo.trained(state))
    model.eval()
    x = rows()
    y = model(x)
    folded = tools.fold(lambda m, x: m(x), model, x)
    assert [(pair.norm, pair.side) for pair in folded.pairs] == [("first", "next")]
    assert "made by relu" in folded.left["second"]
    for other in (folded.variables, folded.stripped):
        np.testing.assert_allclose(other(x), y, atol=1e-5 * float(jnp.abs(y).max()), rtol=0)
