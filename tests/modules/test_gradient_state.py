"""Tests the gradient statistics of PowerNorm and MovingAverageBatchNorm against the papers' algorithms in NumPy.

The new statistics are returned as the gradient of the old ones, so that a training step is a single gradient.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training.train_state import TrainState
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import bnjax
from tests.support.cases import assert_close, unit

STEPS, ROWS, CHANNELS, EPSILON, BUFFER, WARMUP = 7, 16, 3, 1e-5, 3, 2
TOLERANCE = 200 * STEPS * unit("float32")  # rounding of a step's sums of 16, some ten operations each, over the steps
MASKS = {"no mask": None, "rows": np.arange(ROWS)[:, None] % 3 > 0, "weights": (np.arange(ROWS)[:, None] % 4) / 2.0}


def _batches():
    """Returns x and dy (the derivative of the loss Σ y·h) of each step, and scale and bias."""
    rng = np.random.default_rng(0)
    batches = [(rng.normal(size=(ROWS, CHANNELS)) * (1 + i) + 0.5, rng.normal(size=(ROWS, CHANNELS))) for i in range(7)]
    return batches, rng.uniform(0.5, 1.5, CHANNELS), rng.normal(size=CHANNELS)


def _weights(mask):
    return np.ones((ROWS, 1)) if mask is None else np.asarray(mask, np.float64)


def power_norm(mask, alpha=0.9):
    """Computes Shen 2020, algorithm 2, with weights: y, dx, ψ² and ν of every step."""
    batches, scale, bias = _batches()
    w, psi2, nu = _weights(mask), np.ones(CHANNELS), np.zeros(CHANNELS)
    W = w.sum()
    for x, h in batches:
        psi = np.sqrt(psi2 + EPSILON)
        xhat, dxhat = x / psi, h * scale
        dx = (dxhat - w * nu * xhat) / psi
        gamma, lam = (w * xhat**2).sum(0) / W, (dxhat * xhat).sum(0) / W
        psi2, nu = (
            alpha * psi2 + (1 - alpha) * (w * x**2).sum(0) / W,
            nu * (1 - (1 - alpha) * gamma) + (1 - alpha) * lam,
        )
        yield dict(y=xhat * scale + bias, dx=dx, var=psi2, state=[nu])


def moving_average(mask, momentum=0.98):
    """Computes Yan 2020, section 4, with weights: own statistics in the first steps, then averages over the last m."""
    batches, scale, bias = _batches()
    w, squares, projections, var, r_max = _weights(mask), [], [], np.ones(CHANNELS), 5.0
    W = w.sum()
    for t, (x, h) in enumerate(batches):
        squares.append((w * x**2).sum(0) / W)
        early = t < WARMUP
        chi = np.sqrt((squares[-1] if early else np.mean(squares[-BUFFER:], 0)) + EPSILON)
        r = 1 if early else np.clip(chi / np.sqrt(var + EPSILON), 1 / r_max, r_max)
        xhat, dxhat = x / chi, h * scale * r
        projections.append((dxhat * xhat).sum(0) / W)
        pull = projections[-1] if early else np.mean(projections[-BUFFER:], 0)
        weights = momentum ** np.arange(t, -1, -1)
        var = (weights[:, None] * squares).sum(0) / weights.sum()
        recent = [np.array([np.zeros(CHANNELS)] * BUFFER + s)[-BUFFER:] for s in (squares, projections)]
        dx = (dxhat - w * pull * xhat) / chi
        yield dict(y=r * xhat * scale + bias, dx=dx, var=var, state=[*recent, np.full(CHANNELS, t + 1.0)])


def _functional(name, mask=None, axis_name=None):
    """Returns a step (x, h, scale, bias, running, state) -> (y, dx, running, state)."""

    def normalise(x, state, scale, bias, var):
        options = dict(mask=mask, axis_name=axis_name, epsilon=EPSILON)
        if name == "PowerNorm":
            return bnjax.power_norm(x, var, state, scale, bias, **options)
        return bnjax.moving_average_batch_norm(x, var, state, scale, bias, warmup=WARMUP, **options)

    def step(x, h, scale, bias, running, state):
        def loss(x, state):
            y, moments = normalise(x, state, scale, bias, running.var)
            return jnp.sum(y * h), (y, moments)

        (dx, state), (y, moments) = jax.grad(loss, (0, 1), has_aux=True)(x, state)
        options = dict(momentum=0.9) if name == "PowerNorm" else dict(momentum=0.98, debias=True)
        return y, dx, bnjax.update_running(running, moments, **options), state

    return step


ORACLES = {"PowerNorm": power_norm, "MovingAverageBatchNorm": moving_average}
FIELDS = {"PowerNorm": {}, "MovingAverageBatchNorm": dict(buffer_size=BUFFER, warmup=WARMUP)}


def _start(name):
    zero = jnp.zeros(CHANNELS)
    running = bnjax.RunningStats(zero, zero + 1, zero)
    return running, zero if name == "PowerNorm" else bnjax.RecentStats.start((CHANNELS,), BUFFER)


def _check(want, got):
    for key, wanted in want.items():
        for w, g in zip(wanted, got[key], strict=True) if key == "state" else [(wanted, got[key])]:
            assert_close(g, w, TOLERANCE, what=key)


def _run(name, mask, step):
    batches, scale, bias = _batches()
    running, state = _start(name)
    scale, bias = jnp.asarray(scale, jnp.float32), jnp.asarray(bias, jnp.float32)
    for (x, h), want in zip(batches, ORACLES[name](mask), strict=True):
        x, h = jnp.asarray(x, jnp.float32), jnp.asarray(h, jnp.float32)
        y, dx, running, state = step(x, h, scale, bias, running, state)
        _check(want, dict(y=y, dx=dx, var=running.var, state=jax.tree.leaves(state)))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("name", ORACLES)
def test_steps_are_the_papers(name, mask):
    _run(name, mask, jax.jit(_functional(name, mask)))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", ORACLES)
def test_devices_share_the_statistics(name, check_vma):
    """Checks that the state is that of the whole batch on every device, without a sum afterwards."""
    data, same = P("data"), P()
    mapped = jax.shard_map(
        _functional(name, axis_name="data"),
        mesh=Mesh(np.array(jax.devices()), ("data",)),
        in_specs=(data, data, same, same, same, same),
        out_specs=(data, data, same, same),
        check_vma=check_vma,
    )
    _run(name, None, jax.jit(mapped))


@pytest.mark.parametrize("name", ORACLES)
def test_linen_with_flax_train_state(name):
    """Checks that `TrainState` overwrites the statistics with their gradients, without the optimizer."""
    module = getattr(bnjax.linen, name)(use_running_average=False, epsilon=EPSILON, **FIELDS[name])
    batches, scale, bias = _batches()
    variables = module.init(jax.random.key(0), jnp.ones((ROWS, CHANNELS)))
    stats = variables.pop("batch_stats")
    variables["params"] = dict(scale=jnp.asarray(scale, jnp.float32), bias=jnp.asarray(bias, jnp.float32))
    state = TrainState.create(apply_fn=module.apply, params=variables, tx=optax.sgd(0.0))
    for (x, h), want in zip(batches, ORACLES[name](None), strict=True):

        def loss(variables, x, h=h, stats=stats):
            y, updates = module.apply({**variables, "batch_stats": stats}, x, mutable=["batch_stats"])
            return jnp.sum(y * h), (y, updates["batch_stats"])

        (grads, dx), (y, stats) = jax.grad(loss, (0, 1), has_aux=True)(state.params, jnp.asarray(x, jnp.float32))
        state = state.apply_gradients(grads=grads)
        kept = state.params[OVERWRITE_WITH_GRADIENT]
        names = ["projection"] if name == "PowerNorm" else bnjax.RecentStats._fields
        _check(want, dict(y=y, dx=dx, var=stats["var"], state=[kept[k] for k in names]))


@pytest.mark.parametrize("name", ORACLES)
def test_nnx(name):
    module = getattr(bnjax.nnx, name)(CHANNELS, epsilon=EPSILON, **FIELDS[name], rngs=nnx.Rngs(0))
    batches, scale, bias = _batches()
    nnx.update(module, dict(scale=nnx.Param(jnp.asarray(scale, jnp.float32))))
    nnx.update(module, dict(bias=nnx.Param(jnp.asarray(bias, jnp.float32))))
    trained = nnx.DiffState(0, nnx.Any(nnx.Param, bnjax.nnx.OverwriteWithGradient))
    for (x, h), want in zip(batches, ORACLES[name](None), strict=True):

        def loss(module, x, h=h):
            y = module(x)
            return jnp.sum(y * h), y

        x = jnp.asarray(x, jnp.float32)
        (grads, dx), y = nnx.grad(loss, argnums=(trained, 1), has_aux=True)(module, x)
        nnx.update(module, nnx.filter_state(grads, bnjax.nnx.OverwriteWithGradient))
        names = ["projection"] if name == "PowerNorm" else [f"recent_{k}" for k in bnjax.RecentStats._fields]
        state = [getattr(module, k)[...] for k in names]
        _check(want, dict(y=y, dx=dx, var=module.var[...], state=state))


@pytest.mark.parametrize("name", ORACLES)
def test_a_bad_batch_leaves_no_trace(name):
    step = _functional(name)
    running, state = _start(name)
    x = jnp.ones((ROWS, CHANNELS)).at[3, 1].set(jnp.nan)
    _, _, new_running, new_state = step(x, x * 0 + 1, jnp.ones(CHANNELS), jnp.zeros(CHANNELS), running, state)
    for old, new in zip(jax.tree.leaves((running, state)), jax.tree.leaves((new_running, new_state)), strict=True):
        np.testing.assert_array_equal(new[..., 1], old[..., 1])
        assert np.isfinite(new).all()


@pytest.mark.parametrize("mask", [np.zeros((ROWS, 1), bool), np.arange(ROWS)[:, None] > 3], ids=["nobody", "nan"])
@pytest.mark.parametrize("name", ORACLES)
def test_nan_at_weight_zero_does_not_get_out(name, mask):
    step = _functional(name, mask)
    running, state = _start(name)
    x = jnp.where(mask, 1.0, jnp.nan) * jnp.ones((ROWS, CHANNELS))
    out = step(x, jnp.ones_like(x), jnp.ones(CHANNELS), jnp.zeros(CHANNELS), running, state)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(out))


def test_arguments():
    x, v = jnp.ones((4, CHANNELS)), jnp.ones(CHANNELS)
    with pytest.raises(ValueError, match="r_max"):
        bnjax.moving_average_batch_norm(x, v, r_max=0.5)
    with pytest.raises(ValueError, match=r"RecentStats\.start"):
        bnjax.moving_average_batch_norm(x, v, bnjax.RecentStats.start((2,), 3))
    with pytest.raises(ValueError, match="momentum"):
        bnjax.power_norm(x, v, gradient_momentum=1.5)
    with pytest.raises(ValueError, match="projection must have the shape"):
        bnjax.power_norm(x, v, jnp.ones(2))


@pytest.mark.parametrize("name", ORACLES)
def test_devices_that_normalise_apart_share_the_mean_of_their_states(name):
    """Checks that without axis_name the states of the devices are averaged, not summed (under check_vma)."""
    x, h = (jnp.asarray(a, jnp.float32) for a in _batches()[0][0])
    vectors, (running, state) = (jnp.ones(CHANNELS), jnp.zeros(CHANNELS)), _start(name)
    local = lambda x, h: _functional(name)(x, h, *vectors, running, state)[3]  # noqa: E731
    mesh, data = Mesh(np.array(jax.devices()), ("data",)), P("data")
    shared = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(data, data), out_specs=P()))(x, h)
    each = [local(x[i : i + 2], h[i : i + 2]) for i in range(0, ROWS, 2)]
    jax.tree.map(lambda a, *b: assert_close(a, np.mean(b, 0), TOLERANCE), shared, *each)


@pytest.mark.parametrize("name", ORACLES)
def test_transformations_agree(name):
    """Checks that vmap and scan over a step with its gradient change nothing."""
    step, (running, state) = _functional(name), _start(name)
    x, h = (jnp.asarray(a, jnp.float32) for a in _batches()[0][0])
    scale, bias = jnp.ones(CHANNELS), jnp.zeros(CHANNELS)
    both = jnp.stack([x, 2 * x - 1])
    each = jax.tree.map(lambda *a: jnp.stack(a), *(step(x, h, scale, bias, running, state) for x in both))
    mapped = jax.vmap(step, (0, None, None, None, None, None))(both, h, scale, bias, running, state)
    scanned = jax.lax.scan(lambda c, x: (c, step(x, h, scale, bias, running, state)), 0, both)[1]
    for got in (mapped, scanned):
        jax.tree.map(lambda a, b: assert_close(a, b, TOLERANCE, 1 + np.max(np.abs(b))), got, each)


@pytest.mark.parametrize("name", ORACLES)
def test_linen_makes_the_state_in_any_mode_and_does_without(name):
    module, x = getattr(bnjax.linen, name)(), jnp.ones((4, CHANNELS))
    made = [module.init(jax.random.key(0), x, use_running_average=mode) for mode in (False, True)]
    chex.assert_trees_all_equal(*made)
    without = {k: v for k, v in made[0].items() if k != OVERWRITE_WITH_GRADIENT}
    y, _ = module.apply(without, x, use_running_average=False, mutable=["batch_stats"])
    np.testing.assert_array_equal(y, module.apply(made[0], x, use_running_average=False, update_stats=False))
