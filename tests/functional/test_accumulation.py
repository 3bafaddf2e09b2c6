"""Tests statistics over several micro-batches, calls and groups: they are exact, with one update for all of them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core.scope import DenyList
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import bnjax
from tests.support import oracle
from tests.support.cases import SHARDED, assert_close, by_name, expected, tolerance, unit

KEY = jax.random.key(0)


class Net(nn.Module):
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, mask=None, **flags):
        for width in (5, 3):
            x = nn.Dense(width)(x)
            x = nn.relu(bnjax.BatchNorm(momentum=0.9, axis_name=self.axis_name)(x, False, mask=mask, **flags))
        return x


def _gather(net, variables, parts, **options):
    moments = {}
    for x in parts:
        _, updates = net.apply({**variables, "moments": moments}, x, update_stats=False, mutable=["moments"], **options)
        moments = updates["moments"]
    return moments


@pytest.mark.slow
def test_moments_of_micro_batches_are_those_of_the_batch():
    """Checks the first layer, whose input does not depend on how the batch is split."""
    x = jax.random.normal(KEY, (24, 4)) * 3 + 5
    net = Net()
    variables = net.init(KEY, x)
    assert set(variables) == {"params", "batch_stats"}
    gathered = _gather(net, variables, (x[:7], x[7:16], x[16:]))["BatchNorm_0"]
    whole = _gather(net, variables, (x,))["BatchNorm_0"]
    for name in ("mean", "var", "count"):
        assert_close(gathered[name], whole[name], 64 * unit("float32"), what=name)
    assert_close(gathered["count"], np.full(5, 24.0), 0)


def test_one_update_of_all_layers():
    x = jax.random.normal(KEY, (24, 4))
    net = Net()
    variables = net.init(KEY, x)
    once = bnjax.tools.apply_moments(variables["batch_stats"], _gather(net, variables, (x,)), momentum=0.9)
    _, updates = net.apply(variables, x, mutable=["batch_stats"])
    jax.tree.map(lambda a, b: assert_close(a, b, 8 * unit("float32")), once, updates["batch_stats"])


@pytest.mark.parametrize("mutable", [True, DenyList("nothing"), ["batch_stats"]], ids=str)
def test_moments_come_only_when_named(mutable):
    net, x = Net(), jnp.ones((4, 4))
    _, updates = net.apply(net.init(KEY, x), x, mutable=mutable)
    assert "moments" not in updates


def test_moments_of_a_stranger_are_refused():
    net, x = Net(), jnp.ones((4, 4))
    variables = net.init(KEY, x)
    moments = _gather(net, variables, (x,))
    with pytest.raises(ValueError, match="BatchNorm_7 have no statistics"):
        bnjax.tools.apply_moments(variables["batch_stats"], {"BatchNorm_7": moments["BatchNorm_0"]})


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
def test_the_gradient_of_the_full_batch_from_micro_batches(remat):
    """Checks that micro-batches on a mapped axis share statistics and give the gradient and statistics of the whole
    batch.
    """
    x, target = jax.random.normal(KEY, (24, 4)), jax.random.normal(jax.random.key(1), (24, 3))
    variables = Net().init(KEY, x)

    def loss(params, net, x, target):
        y, updates = net.apply({**variables, "params": params}, x, mutable=["batch_stats"])
        return jnp.sum((y - target) ** 2), updates["batch_stats"]

    def by_micro_batches(params):
        cut = lambda a: a.reshape(4, 6, -1)  # noqa: E731
        part = lambda x, t: loss(params, Net(axis_name="micro"), x, t)  # noqa: E731
        part = jax.checkpoint(part) if remat else part
        losses, stats = jax.vmap(part, axis_name="micro", out_axes=(0, None))(cut(x), cut(target))
        return losses.sum(), stats

    want, want_stats = jax.grad(loss, has_aux=True)(variables["params"], Net(), x, target)
    got, stats = jax.grad(by_micro_batches, has_aux=True)(variables["params"])
    size = 1 + max(
        np.abs(g).max() for g in jax.tree.leaves(want)
    )  # biases before BN have no gradient: terms that cancel
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5, size), got, want)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-6, 1 + np.abs(b).max()), stats, want_stats)


# Statistics of a group, running averages over all devices ------------------------------------------------------------

MESH = Mesh(np.array(jax.devices()).reshape(2, 4), ("group", "member"))
SPEC = P(("group", "member"))


def _both(step, x, mask, check_vma):
    out = (SPEC, P())
    return jax.jit(jax.shard_map(step, mesh=MESH, in_specs=(SPEC, SPEC), out_specs=out, check_vma=check_vma))(x, mask)


WAYS = {
    "two axes": (dict(axis_name="member", stats_axis_name="group"), 2, True),
    "two axes, no vma": (dict(axis_name="member", stats_axis_name="group"), 2, False),
    "two axes, one of them pooled already": (dict(axis_name="member", stats_axis_name=("group", "member")), 2, True),
    "two axes, one of them pooled already, no vma": (
        dict(axis_name="member", stats_axis_name=("group", "member")),
        2,
        False,
    ),
    "each device": (dict(stats_axis_name=("group", "member")), 8, True),
    "index groups": (
        dict(
            axis_name=("group", "member"),
            axis_index_groups=[[0, 1, 2, 3], [4, 5, 6, 7]],
            stats_axis_name=("group", "member"),
        ),
        2,
        False,
    ),
}


@pytest.mark.parametrize("api", ["linen", pytest.param("nnx", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", [c.name for c in SHARDED if c.dtype == "float32"])
@pytest.mark.parametrize("way", WAYS)
def test_groups_normalise_and_everybody_is_averaged(way, case, api):
    names, groups, check_vma = WAYS[way]
    case = by_name(case)
    x, scale, bias, dy, mask = case.arrays()
    mask = np.ones((len(x), 1, 1), bool) if mask is None else mask
    plain = dict(use_scale=False, use_bias=False, momentum=0.9, use_running_average=False, **names)

    def linen(x, mask):
        y, updates = bnjax.BatchNorm(**plain).apply({"batch_stats": stats}, x, mask=mask, mutable=["batch_stats"])
        return y, updates["batch_stats"]

    def with_nnx(x, mask):
        norm = bnjax.nnx.BatchNorm(x.shape[-1], **plain, rngs=nnx.Rngs(0))
        y = norm(x, mask=mask)
        return y, dict(mean=norm.mean[...], var=norm.var[...])

    channels = x.shape[-1]
    stats = dict(mean=jnp.zeros(channels), var=jnp.ones(channels))
    y, running = _both(linen if api == "linen" else with_nnx, x, mask, check_vma)
    parts = [
        expected(case, (a, np.ones_like(scale), np.zeros_like(bias), d, m))
        for a, d, m in zip(*(np.split(v, groups) for v in (x, dy, mask)), strict=True)
    ]
    if all(p.statistics.count.any() for p in parts):  # y of a group without valid rows is not defined by the oracle
        assert_close(y, np.concatenate([p.y for p in parts]), tolerance(case), what="y")
    mean, var = oracle.update_running((np.zeros(channels), np.ones(channels)), oracle.statistics(x, (-1,), mask), 0.9)
    assert_close(running["mean"], mean, tolerance(case), 1 + case.offset, "mean")
    # The variance of the means: each is rounded in proportion to the offset.
    assert_close(running["var"], var, 16 * tolerance(case) * (1 + case.offset / 16), what="var")


def _each_with_its_own(how, norm, x, stats):
    """Returns training outputs on eight devices whose running averages differ."""

    def step(x, stats):
        return norm.apply({"batch_stats": stats}, x, mutable=["batch_stats"])

    x = x.reshape(8, -1, x.shape[-1])
    if how == "shard_map":
        local = lambda x, s: jax.tree.map(lambda a: a[None], step(*jax.tree.map(lambda a: a[0], (x, s))))  # noqa: E731
        mesh, spec = Mesh(np.array(jax.devices()), ("data",)), P("data")
        mapped = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    else:
        mapped = dict(pmap=jax.pmap, vmap=jax.vmap)[how](step, axis_name="data")
    return mapped(x, stats)


@pytest.mark.parametrize("how", ["shard_map", "pmap", "vmap"])
def test_replicas_that_have_drifted_apart(how):
    """Checks that the batch statistics do not depend on the running averages, nor on which replica holds which."""
    x = np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32) + 50
    norm = bnjax.BatchNorm(use_running_average=False, momentum=0.0, axis_name="data", use_scale=False, use_bias=False)
    stats = dict(mean=40 + jnp.arange(24.0).reshape(8, 3), var=jnp.ones((8, 3)))
    y, updates = _each_with_its_own(how, norm, x, stats)
    want = oracle.batch_norm(x, np.ones(3), np.zeros(3), x, (1,))
    assert_close(y.reshape(x.shape), want.y, 1e-5, what="y")
    assert_close(updates["batch_stats"]["mean"], np.tile(want.statistics.mean, (8, 1)), 1e-6, what="mean")
    assert_close(updates["batch_stats"]["var"], np.tile(want.statistics.var, (8, 1)), 1e-5, what="var")


def test_a_forgotten_axis_name_is_noticed():
    """Checks for a warning if axis_name is missing; check_vma types the statistics as varying over devices."""
    norm = bnjax.BatchNorm(use_running_average=False)
    variables = norm.init(KEY, jnp.ones((1, 3)))

    def step(x, variables):
        y, updates = norm.apply(variables, x, mutable=["batch_stats"])
        return y, jax.tree.map(lambda s: s[None], updates)

    mapped = jax.shard_map(step, mesh=MESH, in_specs=(SPEC, P()), out_specs=SPEC)
    with pytest.warns(UserWarning, match=r"\(2, 3\) was normalised by this device's rows alone.*axis_name=\['group"):
        jax.jit(mapped)(jnp.ones((16, 3)), variables)
    local = jax.shard_map(
        lambda x, v: norm.apply(v, x, update_stats=False), mesh=MESH, in_specs=(SPEC, P()), out_specs=SPEC
    )
    jax.jit(local)(jnp.ones((16, 3)), variables)  # without an update there is nothing to warn of
