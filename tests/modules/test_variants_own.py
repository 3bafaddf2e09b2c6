"""Tests properties of single variants; those of all variants are in test_variants.py."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax
from bnjax.functional import batch_renorm, ghost_batch_norm, renorm_d_max, renorm_r_max, split_batch_norm
from experiments.bench.compiled import hlo
from tests.support import naive, oracle
from tests.support.cases import assert_close, by_name, tolerance

MESH = Mesh(np.array(jax.devices()), ("data",))
CASE = by_name("plain_shards")  # (32, 3, 4)
TRAIN = dict(use_running_average=False, mutable=["batch_stats"])

# Ghost: sizes that do not divide -------------------------------------------------------------------------------------

SIZES = {
    "size 4": (dict(virtual_batch_size=4), [4, 4, 2]),
    "size 5": (dict(virtual_batch_size=5), [5, 5]),
    "more than there are": (dict(virtual_batch_size=64), [10]),
    "4 of them": (dict(num_virtual_batches=4), [3, 3, 2, 2]),
    "one for each at most": (dict(num_virtual_batches=64), [1] * 10),
}


@pytest.mark.slow
@pytest.mark.parametrize(("options", "sizes"), SIZES.values(), ids=SIZES)
def test_ghost_of_any_size(options, sizes):
    """Checks that each slice is normalized by itself, in value and derivative, and the moments are those of
    all rows.
    """
    rng = np.random.default_rng(0)
    x, h, scale, bias = rng.normal(size=(3, 10, 2)), rng.normal(size=(3, 10, 2)), np.array([2.0] * 3), np.ones(3)
    mask = rng.integers(0, 3, (1, 10, 1))
    parts = np.split(np.arange(10), np.cumsum(sizes)[:-1])

    def slices(x):
        each = (naive.batch_norm(x[:, i], scale, bias, (0,), mask=mask[:, i]) for i in parts)
        return jnp.concatenate(list(each), axis=1)

    def ours(x):
        return ghost_batch_norm(x, scale, bias, axis=0, mask=mask, **options)[0]

    with jax.enable_x64(True):
        (y, dx), (want, want_dx) = (
            jax.jit(jax.value_and_grad(lambda x, f=f: jnp.sum(f(x) * h)))(x) for f in (ours, slices)
        )
        assert_close(y, want, 1e-9)
        assert_close(dx, want_dx, 1e-9, 1 + np.max(np.abs(want_dx)))  # of one row it is 0 up to rounding · 1/√ε
        moments = ghost_batch_norm(x, axis=0, mask=mask, **options)[1]
    for got, expected in zip(moments, oracle.statistics(x, (0,), mask), strict=True):
        assert_close(got, expected, 1e-12)


def test_ghost_batches_of_an_explicitly_sharded_batch_lie_within_its_shards():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    x = np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, P("data")))
        y, _ = jax.jit(lambda x: bnjax.ghost_batch_norm(x, virtual_batch_size=2))(sharded)
        np.testing.assert_allclose(y, bnjax.ghost_batch_norm(x, virtual_batch_size=2)[0], atol=1e-6)
        for options in (dict(virtual_batch_size=8), dict(virtual_batch_size=5), dict(num_virtual_batches=2)):
            with pytest.raises(ValueError, match="must lie within the 8 shards of an explicitly sharded axis"):
                bnjax.ghost_batch_norm(sharded, **options)


@pytest.mark.parametrize("options", [{}, dict(virtual_batch_size=2, num_virtual_batches=2), dict(virtual_batch_size=0)])
def test_ghost_wants_one_of_size_and_number(options):
    with pytest.raises(ValueError, match="one of virtual_batch_size and num_virtual_batches, and it must be positive"):
        ghost_batch_norm(jnp.ones((4, 2)), **options)


def test_ghost_wants_examples():
    with pytest.raises(ValueError, match="needs an axis to cut"):
        ghost_batch_norm(jnp.ones(3), virtual_batch_size=2)


# Ghost: a virtual batch per device -----------------------------------------------------------------------------------


def _value_and_dx(f, x, dy):
    return jax.grad(lambda x: (lambda y: (jnp.sum(y * dy), y))(f(x)[0]), has_aux=True)(x)


def _per_device(f):
    return jax.shard_map(partial(_value_and_dx, f), mesh=MESH, in_specs=P("data"), out_specs=P("data"))


def test_ghosts_of_devices_are_batch_norm_per_device():
    """Checks value and derivative under plain jit; devices exchange only the predicate of the guard, no rows."""
    x, _, _, dy, _ = (None if a is None else jnp.asarray(a) for a in CASE.arrays())
    ghosts = jax.jit(
        partial(_value_and_dx, partial(ghost_batch_norm, num_virtual_batches=8)),
        in_shardings=NamedSharding(MESH, P("data")),
    )
    for got, want in zip(ghosts(x, dy), jax.jit(_per_device(bnjax.batch_norm))(x, dy), strict=True):
        assert_close(got, want, tolerance(CASE))
    compiled = ghosts.lower(x, dy).compile()
    main, rare = hlo.all_reduces(compiled)
    assert all(payload.startswith("pred") for payload in sum(rare.values(), main)), (main, rare)
    assert not any(op in compiled.as_text() for op in ("all-gather(", "all-to-all(", "collective-permute("))


def test_ghosts_within_devices_need_no_collective():
    """Checks that y and dx need no collective inside shard_map, and the pooled running averages two small ones."""
    x, dy = jnp.ones(CASE.shape), jnp.ones(CASE.shape)
    f = partial(ghost_batch_norm, virtual_batch_size=2, axis_name="data")
    assert hlo.all_reduces(jax.jit(_per_device(f)).lower(x, dy).compile()) == ([], {})
    moments = jax.shard_map(lambda x: f(x)[1], mesh=MESH, in_specs=P("data"), out_specs=P())
    main, _ = hlo.all_reduces(jax.jit(moments).lower(x).compile())
    assert [hlo.elements(payload) for payload in main] == [2 * 4, 4]


# Renorm --------------------------------------------------------------------------------------------------------------


def test_renorm_lies_between_training_and_evaluation():
    """Checks r = 1, d = 0, which is batch normalization, and no limits, which uses the running averages."""
    x, scale, bias, _, _ = CASE.arrays()
    mean, var = jnp.full(4, 1.0), jnp.full(4, 3.0)
    tight, _ = batch_renorm(x, mean, var, scale, bias, r_max=1.0, d_max=0.0)
    loose, _ = batch_renorm(x, mean, var, scale, bias, r_max=jnp.inf, d_max=jnp.inf)
    assert_close(tight, bnjax.batch_norm(x, scale, bias)[0], tolerance(CASE))
    assert_close(loose, bnjax.normalize(x, mean, var, scale, bias), tolerance(CASE))


def test_renorm_limits_are_those_of_the_paper():
    steps = jnp.array([0.0, 5e3, 15e3, 22.5e3, 25e3, 40e3, 1e6])
    assert_close(renorm_r_max(steps), [1, 1, 1 + 2 * 10 / 35, 2, 1 + 2 * 20 / 35, 3, 3], 1e-6)
    assert_close(renorm_d_max(steps), [0, 0, 2.5, 4.375, 5, 5, 5], 1e-6)


@pytest.mark.parametrize("limits", [dict(r_max=0.5), dict(d_max=-1.0), dict(r_max=jnp.array([1.0, 0.0]))])
def test_renorm_wants_room(limits):
    with pytest.raises(ValueError, match="must be at least"):
        batch_renorm(jnp.ones((4, 2)), jnp.zeros(2), jnp.ones(2), **limits)


def test_renorm_limits_follow_the_step():
    """Checks that the third step uses r_max(2) and d_max(2) and counts to 3, in both modules."""
    x = jnp.asarray(CASE.arrays()[0])
    limits = dict(r_max=lambda t: 1 + t / 10, d_max=lambda t: t / 10)
    stats = dict(mean=jnp.full(4, 9.0), var=jnp.full(4, 50.0), steps=jnp.full(4, 2.0))
    want, _ = batch_renorm(x, stats["mean"], stats["var"], r_max=1.2, d_max=0.2)
    y, updates = bnjax.linen.BatchRenorm(use_scale=False, use_bias=False, **limits).apply(
        {"batch_stats": stats}, x, **TRAIN
    )
    module = bnjax.nnx.BatchRenorm(4, **limits, rngs=nnx.Rngs(0))
    nnx.update(module, jax.tree.map(nnx.BatchStat, stats))
    for got in (y, module(x)):
        assert_close(got, want, tolerance(CASE))
    np.testing.assert_array_equal(updates["batch_stats"]["steps"], np.full(4, 3))
    np.testing.assert_array_equal(module.steps[...], np.full(4, 3))


def test_renorm_starts_from_a_checkpoint_of_batch_norm():
    """Checks a checkpoint without steps: they count from 0, where by default r = 1 and d = 0."""
    x = jnp.asarray(CASE.arrays()[0])
    variables = bnjax.BatchNorm().init(jax.random.key(0), x, True)
    want, _ = bnjax.batch_norm(x)
    y, updates = bnjax.linen.BatchRenorm().apply(variables, x, **TRAIN)
    assert_close(y, want, tolerance(CASE))
    assert_close(bnjax.linen.BatchRenorm().apply(variables, x, False, update_stats=False), want, tolerance(CASE))
    np.testing.assert_array_equal(updates["batch_stats"]["steps"], np.ones(4))


@pytest.mark.parametrize("mask", [None, jnp.ones((32, 1, 1))], ids=["no mask", "mask"])
def test_renorm_has_the_all_reduces_of_batch_norm(mask):
    """Checks one all-reduce forward, one backward, one in the guard: moments are computed once, though called twice."""
    vector = jnp.ones(4)

    def loss(x, scale, bias, mask):
        y, _ = batch_renorm(x, bias, scale, scale, bias, mask=mask, axis_name="data")
        return jnp.sum(jnp.sin(y))

    for f, out_specs, count in ((loss, P(), 2), (jax.grad(loss, (0, 1, 2)), (P("data"), P(), P()), 2)):
        if f is loss:  # the sum of the loss is the second all-reduce
            f = lambda *a: jax.lax.psum(loss(*a), "data")  # noqa: E731
        specs = (P("data"), P(), P(), None if mask is None else P("data"))
        mapped = jax.shard_map(f, mesh=MESH, in_specs=specs, out_specs=out_specs)
        main, rare = hlo.all_reduces(jax.jit(mapped).lower(jnp.ones((32, 3, 4)), vector, vector, mask).compile())
        assert len(main) == count, main
        assert [len(v) for v in rare.values()] == [1], rare


# Split ---------------------------------------------------------------------------------------------------------------


def _split_layer():
    x = jnp.asarray(CASE.arrays()[0])
    layer = bnjax.linen.SplitBatchNorm(num_domains=3, use_running_average=False, momentum=0.5)
    variables = layer.init(jax.random.key(0), x, domain=0)
    scale = 1 + jnp.arange(12.0).reshape(3, 4)
    return x, layer, variables | dict(params=dict(variables["params"], scale=scale))


def test_a_traced_domain_is_the_domain():
    x, layer, variables = _split_layer()
    call = jax.jit(lambda domain: layer.apply(variables, x, domain=domain, mutable=["batch_stats"]))
    for domain in range(3):
        want = layer.apply(variables, x, domain=domain, mutable=["batch_stats"])
        jax.tree.map(partial(assert_close, tol=tolerance(CASE)), call(domain), want)
    module = bnjax.nnx.SplitBatchNorm(4, num_domains=3, momentum=0.5, rngs=nnx.Rngs(0))
    nnx.jit(lambda m, domain: m(x, domain=domain))(module, jnp.array(2))
    assert_close(module.mean[...], want[1]["batch_stats"]["mean"], tolerance(CASE))


@pytest.mark.parametrize("domain", [-1, 3])
def test_a_domain_that_is_none(domain):
    """Checks a domain out of range: an error if it is known; if traced, y is NaN and the statistics stay unchanged."""
    x, layer, variables = _split_layer()
    with pytest.raises(ValueError, match="one of the 3 domains 0 to 2"):
        layer.apply(variables, x, domain=domain, mutable=["batch_stats"])
    y, updates = jax.jit(lambda d: layer.apply(variables, x, domain=d, mutable=["batch_stats"]))(domain)
    assert np.isnan(y).all()
    chex.assert_trees_all_equal(updates["batch_stats"], variables["batch_stats"])


@pytest.mark.parametrize("domain", [jnp.array([0, 1]), 0.0, True])
def test_a_domain_is_one_integer(domain):
    with pytest.raises(ValueError, match="one integer for the whole batch"):
        split_batch_norm(jnp.ones((4, 2)), domain, jnp.ones((2, 2)))


def test_split_moments_are_gathered_by_domain():
    """Checks that gathered moments update each domain by its own batches, and leave a domain without batches alone."""
    x, layer, variables = _split_layer()
    held = {}
    for domain, part in ((0, x[:8]), (2, x[8:16]), (0, x[16:])):
        _, held = layer.apply(variables | held, part, domain=domain, update_stats=False, mutable=["moments"])
    new = bnjax.tools.apply_moments(variables["batch_stats"], held["moments"], momentum=0.0)
    for row, rows in ((0, jnp.concatenate([x[:8], x[16:]])), (2, x[8:16])):
        assert_close(new["mean"][row], bnjax.batch_moments(rows).mean, tolerance(CASE))
    np.testing.assert_array_equal(new["mean"][1], np.zeros(4))


def test_nnx_says_that_a_domain_is_missing():
    with pytest.raises(ValueError, match="domain must be given"):
        bnjax.nnx.SplitBatchNorm(4, rngs=nnx.Rngs(0))(jnp.ones((2, 4)))


# Frozen --------------------------------------------------------------------------------------------------------------


def test_frozen_takes_the_variables_of_batch_norm():
    """Checks that FrozenBatchNorm equals BatchNorm's evaluation in any mode, also after `.train()` in nnx."""
    x = jnp.asarray(CASE.arrays()[0])
    source = bnjax.nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    source(x)
    frozen = bnjax.nnx.FrozenBatchNorm(4, rngs=nnx.Rngs(0))
    nnx.update(frozen, nnx.state(source))
    source.eval()
    frozen.train()
    variables = dict(
        params=nnx.to_pure_dict(nnx.state(source, nnx.Param)),
        batch_stats=nnx.to_pure_dict(nnx.state(source, nnx.BatchStat)),
    )
    for y in (frozen(x, False), bnjax.linen.FrozenBatchNorm().apply(variables, x, False)):
        assert_close(y, source(x), tolerance(CASE))
