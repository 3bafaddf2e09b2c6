"""Tests what Flax gets wrong today against what bnjax gives: the rows of docs/guides/coming_from/flax.md.

If Flax fixes one, the test fails and the page has a row to change.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import bnjax
from experiments.bench.compiled import hlo
from tests.support import oracle
from tests.support.cases import assert_close

OURS, THEIRS = bnjax.BatchNorm, nn.BatchNorm
MESH = Mesh(np.array(jax.devices()[:4]), ("data",))


def _apply(module, x, mask=None, **options):
    norm = module(use_running_average=False, momentum=0.0, **options)
    variables = norm.init(jax.random.key(0), jnp.ones((1, x.shape[-1])))
    y, updates = norm.apply(variables, x, mask=mask, mutable=["batch_stats"])
    return y, updates["batch_stats"]


def _sharded(module, x, mask):
    """Applies a module over four devices under shard_map; returns y and the statistics of each device."""

    def local(x, mask):
        y, stats = _apply(module, x, mask, axis_name="data")
        return y, jax.tree.map(lambda s: s[None], stats)

    spec = P("data")
    return jax.jit(jax.shard_map(local, mesh=MESH, in_specs=spec, out_specs=spec, check_vma=False))(x, mask)


def _uneven(*counts):
    return jnp.concatenate([jnp.arange(4) < n for n in counts])[:, None]


def test_masks_of_different_counts_per_device():
    """Checks a mask with 4, 4, 1 and 1 valid rows on the four devices."""
    x = jnp.arange(16.0)[:, None]
    mask = _uneven(4, 4, 1, 1)
    want = oracle.statistics(np.asarray(x), (1,), np.asarray(mask))
    _, ours = _sharded(OURS, x, mask)
    assert_close(ours["mean"], np.broadcast_to(want.mean, (4, 1)), 1e-6)
    assert_close(ours["var"], np.broadcast_to(want.var, (4, 1)), 1e-6)
    _, theirs = _sharded(THEIRS, x, mask)
    assert_close(theirs["mean"], np.full((4, 1), 6.75), 1e-6)  # the mean of 1.5, 5.5, 8 and 12; 4.8 is right
    assert_close(want.mean, [4.8], 1e-6)


def test_a_device_that_is_masked_whole():
    x, mask = jnp.arange(16.0)[:, None], _uneven(4, 4, 4, 0)
    _, ours = _sharded(OURS, x, mask)
    assert_close(ours["mean"], np.full((4, 1), 5.5), 1e-6)
    assert np.isnan(_sharded(THEIRS, x, mask)[1]["mean"]).all()


def test_everybody_masked():
    x, mask = jnp.arange(16.0)[:, None], _uneven(0, 0, 0, 0)
    y, ours = _sharded(OURS, x, mask)
    assert_close(ours["mean"], np.zeros((4, 1)), 0)
    assert_close(ours["var"], np.ones((4, 1)), 0)
    assert np.isfinite(y).all()
    assert np.isnan(_sharded(THEIRS, x, mask)[1]["mean"]).all()


@pytest.mark.parametrize(("module", "finite"), [(OURS, True), (THEIRS, False)])
def test_nan_at_a_masked_position(module, finite):
    x = jnp.array([[1.0], [2.0], [4.0], [jnp.nan]])
    mask = jnp.isfinite(x)

    def loss(x):
        y, _ = _apply(module, x, mask)
        return jnp.sum(jnp.where(mask, y**3, 0))

    assert np.isfinite(jax.grad(loss)(x)).all() == finite


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(("module", "finite"), [(OURS, True), (THEIRS, False)])
def test_one_bad_batch(module, finite, bad):
    norm = module(use_running_average=False)
    good, spoiled = jnp.ones((4, 2)), jnp.ones((4, 2)).at[1, 1].set(bad)
    variables = norm.init(jax.random.key(0), good)
    for x in (good, spoiled, good):
        variables = {**variables, **norm.apply(variables, x, mutable=["batch_stats"])[1]}
    assert np.isfinite(variables["batch_stats"]["mean"]).all() == finite


@pytest.mark.parametrize("evaluation", [True, False])
def test_a_wrong_channel_count(evaluation):
    for module, refused in ((OURS, True), (THEIRS, False)):
        norm = module(use_running_average=evaluation, use_scale=False, use_bias=False)
        variables = norm.init(jax.random.key(0), jnp.ones((4, 1)))
        if refused:
            with pytest.raises(ValueError, match=r"\(3,\)"):
                norm.apply(variables, jnp.ones((4, 3)), mutable=["batch_stats"])
        elif evaluation:
            assert norm.apply(variables, jnp.ones((4, 3)), mutable=["batch_stats"])[0].shape == (4, 3)


@pytest.mark.parametrize("options", [dict(momentum=1.5), dict(epsilon=0.0)], ids=str)
def test_options_that_make_no_sense(options):
    x = jnp.arange(8.0).reshape(4, 2)
    for module, refused in ((OURS, True), (THEIRS, False)):
        norm = module(use_running_average=False, **options)
        apply = lambda norm=norm: norm.apply(  # noqa: E731
            norm.init(jax.random.key(0), x), x, mutable=["batch_stats"]
        )
        if refused:
            with pytest.raises(ValueError, match=next(iter(options))):
                apply()
        else:
            apply()


@pytest.mark.parametrize(("ratio", "flax_error"), [(1e2, 1e-3), (1e3, 1e-2), (1e4, 1.0)])
def test_far_from_zero(ratio, flax_error):
    x = (np.random.default_rng(0).normal(size=(4096, 2)) + ratio).astype(np.float32)
    want = (x.astype(np.float64) - x.mean(0, dtype=np.float64)) / np.sqrt(x.astype(np.float64).var(0) + 1e-5)
    assert np.max(np.abs(np.asarray(_apply(OURS, x)[0]) - want)) < 2e-6
    assert np.max(np.abs(np.asarray(_apply(THEIRS, x)[0]) - want)) > flax_error


@pytest.mark.parametrize(
    ("module", "options", "count"),
    [(OURS, {}, 2), (THEIRS, {}, 2), (THEIRS, dict(use_fast_variance=False), 4)],
    ids=["bnjax", "flax", "flax, accurate"],
)
def test_all_reduces_of_a_training_step(module, options, count):
    norm = module(use_running_average=False, axis_name="data", **options)
    variables = norm.init(jax.random.key(0), jnp.ones((1, 4)))

    def gradient(x):
        return jax.grad(lambda x: jnp.sum(jnp.sin(norm.apply(variables, x, mutable=["batch_stats"])[0])))(x)

    mapped = jax.shard_map(gradient, mesh=MESH, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    main, _ = hlo.all_reduces(jax.jit(mapped).lower(jnp.ones((16, 4))).compile())
    assert len(main) == count
