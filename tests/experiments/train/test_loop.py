"""Tests the training step: both partitions and any number of devices give the same numbers."""

import re
from collections.abc import Callable
from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from bnjax.linen import BatchNorm, MovingAverageBatchNorm
from experiments.data.images import Labelled
from experiments.data.pipeline import Batch, evaluation_batches, training_batches
from experiments.errors import ConfigError, RunError
from experiments.models.convolutional import ConvNet
from experiments.train.config import Config, Hardware, Training, check_split, validate
from experiments.train.devices import data_mesh, replicated
from experiments.train.drift import drift
from experiments.train.fingerprint import fingerprint
from experiments.train.loop import (
    Metrics,
    TrainState,
    axis_name,
    chunks,
    create_state,
    evaluate,
    losses,
    make_eval_step,
    make_train_step,
    place,
)
from experiments.train.session import norm_options

BATCH, STEPS = 16, 4


@pytest.fixture(scope="module")
def data() -> Labelled:
    rng = np.random.default_rng(0)
    return Labelled(rng.integers(0, 256, (64, 28, 28, 1), np.uint8), rng.integers(0, 10, 64, np.int32))


def build(partition: str) -> ConvNet:
    return ConvNet(partial(BatchNorm, momentum=0.9, axis_name=axis_name(partition)), widths=(4, 8))


def trained(data: Labelled, partition: str, devices: int, accumulate: int = 1) -> tuple[TrainState, Metrics]:
    """Returns the state after four steps of SGD, and the metrics of the last step.

    Not Adam, which would divide gradients that are zero up to rounding by their own size.
    """
    mesh, model, optimizer = data_mesh(devices), build(partition), optax.sgd(0.05)
    step = make_train_step(model, optimizer, mesh, partition, lambda state, stats: {}, accumulate=accumulate)
    batches = training_batches(data, BATCH, epochs=1, seed=0)
    return list(chunks(step, create_state(model, optimizer, 0, mesh), batches, mesh, [STEPS]))[-1]


@pytest.fixture(scope="module")
def once(data: Labelled) -> Callable[[str, int], tuple[TrainState, Metrics]]:
    """Calls `trained` and caches the result, which tests share."""
    return cache(partial(trained, data))


@pytest.mark.slow
@pytest.mark.parametrize(("partition", "devices"), [("shard_map", 1), ("shard_map", 8), ("jit", 8)])
def test_partition_and_devices_change_nothing(once, partition: str, devices: int) -> None:
    (state, metrics), reference = once(partition, devices), once("jit", 1)  # one device, where the batch is not split
    # Sums of 16·28² ≈ 2^14 terms in another order, through four steps: 2^14 roundings of 6e-8 at the very worst.
    close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
    jax.tree.map(close, jax.device_get(state), jax.device_get(reference[0]))
    jax.tree.map(close, metrics, reference[1])


def test_what_the_backward_pass_updates_goes_from_step_to_step(data: Labelled) -> None:
    """Checks that the gradient statistics of MABN cover the rows of all devices, and that every step is counted."""

    def after(partition: str, devices: int) -> TrainState:
        norm = partial(MovingAverageBatchNorm, buffer_size=STEPS, warmup=1, axis_name=axis_name(partition))
        mesh, model, optimizer = data_mesh(devices), ConvNet(norm, widths=(4,)), optax.sgd(0.05)
        step = make_train_step(model, optimizer, mesh, partition, lambda state, stats: {})
        batches = training_batches(data, BATCH, epochs=1, seed=0)
        return list(chunks(step, create_state(model, optimizer, 0, mesh), batches, mesh, [STEPS]))[-1][0]

    one, eight = jax.device_get((after("jit", 1).overwritten, after("shard_map", 8).overwritten))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), eight, one)
    (kept,) = one.values()
    assert (kept["steps"] == STEPS).all() and (kept["squares"] > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize(("partition", "devices"), [("shard_map", 4), ("jit", 4)])
def test_micro_batches_are_the_same_on_any_devices(once, partition: str, devices: int) -> None:
    (state, metrics), reference = once(partition, devices, 2), once("jit", 1, 2)
    close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
    jax.tree.map(close, jax.device_get(state), jax.device_get(reference[0]))
    jax.tree.map(close, metrics, reference[1])


def test_gradients_and_averages_are_the_means_over_micro_batches(data: Labelled) -> None:
    """Compares one step of gradient descent with rate 1 with the mean of steps on each half of the records."""
    mesh, model, optimizer = data_mesh(1), build("jit"), optax.sgd(1.0)
    batch = next(training_batches(data, BATCH, epochs=1, seed=0))

    def after(batch: Batch, accumulate: int) -> TrainState:
        step = make_train_step(model, optimizer, mesh, "jit", lambda state, stats: {}, accumulate=accumulate)
        return step(create_state(model, optimizer, 0, mesh), place(batch, mesh))[0]

    halves = [after({name: part[start::2] for name, part in batch.items()}, 1) for start in (0, 1)]
    wanted = jax.tree.map(lambda *both: np.mean(both, axis=0), *[(state.params, state.batch_stats) for state in halves])
    both = after(batch, 2)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, (both.params, both.batch_stats), wanted)


def test_devices_for_themselves_give_the_mean_of_the_gradients_of_their_parts(data: Labelled) -> None:
    """Compares one step of gradient descent with rate 1 on two groups of one device with steps on the halves."""
    model, optimizer, batch = build("jit"), optax.sgd(1.0), next(training_batches(data, BATCH, epochs=1, seed=0))

    def after(mesh: Mesh, model: ConvNet, partition: str, batch: Batch) -> TrainState:
        step = make_train_step(model, optimizer, mesh, partition, lambda state, stats: {})
        return jax.device_get(step(create_state(model, optimizer, 0, mesh), place(batch, mesh))[0])

    names = norm_options("shard_map", group=1)
    alone = ConvNet(partial(BatchNorm, momentum=0.9, **names), widths=(4, 8))
    found = after(data_mesh(2, group=1), alone, "shard_map", batch)
    cut = [{name: part[rows] for name, part in batch.items()} for rows in (slice(8), slice(8, 16))]
    halves = [after(data_mesh(1), model, "jit", half) for half in cut]
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda new, *both: close(new, np.mean(both, axis=0)), found.params, *[half.params for half in halves])
    # The running averages follow the rows of both: in the first layer, whose input no statistics have changed.
    whole = after(data_mesh(1), model, "jit", batch)
    jax.tree.map(close, found.batch_stats["BatchNorm_0"], whole.batch_stats["BatchNorm_0"])


def test_one_group_of_all_devices_is_the_whole_batch(data: Labelled, once) -> None:
    mesh, optimizer = data_mesh(4, group=4), optax.sgd(0.05)
    model = ConvNet(partial(BatchNorm, momentum=0.9, **norm_options("shard_map", group=4)), widths=(4, 8))
    step = make_train_step(model, optimizer, mesh, "shard_map", lambda state, stats: {})
    batches = training_batches(data, BATCH, epochs=1, seed=0)
    state, metrics = list(chunks(step, create_state(model, optimizer, 0, mesh), batches, mesh, [STEPS]))[-1]
    close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
    jax.tree.map(close, (jax.device_get(state), metrics), jax.device_get(once("jit", 1)))


def test_the_average_of_the_weights_follows_them(data: Labelled) -> None:
    mesh, model, optimizer = data_mesh(1), build("jit"), optax.sgd(0.05)
    step = make_train_step(model, optimizer, mesh, "jit", lambda state, stats: {}, ema=0.15)
    state = create_state(model, optimizer, 0, mesh, average=True)
    wanted = jax.device_get(state.params)
    batches = training_batches(data, BATCH, epochs=1, seed=0)
    for number, (state, _) in enumerate(chunks(step, state, batches, mesh, [1, 2, 3])):  # noqa: B020
        kept = min(0.15, (1 + number) / (10 + number))
        wanted = jax.tree.map(lambda a, p, kept=kept: kept * a + (1 - kept) * p, wanted, jax.device_get(state.params))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), state.average, wanted)


def test_label_smoothing_spreads_a_part_of_the_label() -> None:
    logits, labels = jnp.array([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0]]), jnp.array([0, 2])
    logs = np.asarray(jax.nn.log_softmax(logits))
    plain = -logs[[0, 1], [0, 2]]
    np.testing.assert_allclose(losses(logits, {"label": labels}), plain, rtol=1e-6)
    wanted = 0.9 * plain - 0.1 * logs.mean(1)
    np.testing.assert_allclose(losses(logits, {"label": labels}, 0.1), wanted, rtol=1e-6)


def test_gradient_state_wants_whole_batches(data: Labelled) -> None:
    mesh, model, optimizer = data_mesh(1), ConvNet(MovingAverageBatchNorm, widths=(4,)), optax.sgd(0.1)
    step = make_train_step(model, optimizer, mesh, "jit", lambda state, stats: {}, accumulate=2)
    batch = place(next(training_batches(data, BATCH, epochs=1, seed=0)), mesh)
    with pytest.raises(ConfigError, match="without micro-batches"):
        step(create_state(model, optimizer, 0, mesh), batch)


@pytest.mark.parametrize("partition", ["shard_map", "jit"])
def test_the_same_seed_on_the_same_devices_gives_the_same_bits(data, once, partition: str) -> None:
    first, second = once(partition, 8), trained(data, partition, 8)
    assert fingerprint(first[0]) == fingerprint(second[0])
    assert first[1] == second[1]


def test_fingerprint_depends_on_every_bit_and_sees_replicas_that_differ() -> None:
    mesh = data_mesh(2)
    state = jax.device_put({"a": np.zeros(3, np.float32), "b": np.zeros(2)}, replicated(mesh))
    other = jax.device_put({"a": np.array([0, 0, -0.0], np.float32), "b": np.zeros(2)}, replicated(mesh))
    assert re.fullmatch("[0-9a-f]{12}", fingerprint(state))
    assert fingerprint(state) == fingerprint(jax.device_get(state))
    assert fingerprint(state) != fingerprint(other)
    parts = [jax.device_put(np.full(2, value), device) for value, device in enumerate(jax.devices()[:2])]
    torn = jax.make_array_from_single_device_arrays((2,), replicated(mesh), parts)
    with pytest.raises(RunError, match=r"different values of \['b'\]"):
        fingerprint({**state, "b": torn})


@pytest.mark.parametrize("devices", [1, 8])
def test_evaluation_does_not_depend_on_the_batch_size(data: Labelled, devices: int) -> None:
    mesh, model = data_mesh(devices), build("jit")
    state = create_state(model, optax.sgd(0.1), 0, mesh)
    step = make_eval_step(model, mesh)
    whole, ragged = (evaluate(step, state, evaluation_batches(data, size), mesh) for size in (64, 24))
    assert whole == pytest.approx(ragged, rel=1e-6)


def test_model_without_normalisation_trains_in_the_same_loop(data: Labelled) -> None:
    class Identity(nn.Module):
        use_running_average: bool

        def __call__(self, x: jax.Array) -> jax.Array:
            return x

    mesh, model, optimizer = data_mesh(2), ConvNet(Identity, widths=(4,)), optax.sgd(0.1)
    step = make_train_step(model, optimizer, mesh, "shard_map", lambda state, stats: {})
    batches = training_batches(data, BATCH, epochs=1, seed=0)
    ((state, rows),) = chunks(step, create_state(model, optimizer, 0, mesh), batches, mesh, [2])
    assert state.batch_stats == {}
    assert np.isfinite(rows[-1]["loss"])


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99])
def test_drift_recovers_the_moments_of_the_batch(momentum: float) -> None:
    x = np.random.default_rng(0).normal(3, 2, (64, 5)).astype(np.float32)
    model = nn.Sequential([BatchNorm(use_running_average=False, momentum=momentum, epsilon=1e-5)])
    variables = model.init(jax.random.key(0), x)
    before = {"layers_0": {"mean": jnp.full(5, 2.5), "var": jnp.full(5, 3.0)}}
    _, updates = model.apply({**variables, "batch_stats": before}, x, mutable=["batch_stats"])
    (layer,) = drift(before, updates["batch_stats"], momentum=momentum, epsilon=1e-5).values()
    mean, var = x.mean(0, dtype=np.float64), x.var(0, dtype=np.float64)
    # new − momentum·old loses the digits that the weight of the batch, 1 − momentum, leaves below it
    rtol = 1e-5 / (1 - momentum)
    np.testing.assert_allclose(layer["mean"], np.sqrt(np.mean((mean - 2.5) ** 2 / 3)), rtol=rtol)
    np.testing.assert_allclose(layer["var"], np.sqrt(np.mean(np.log(var / 3) ** 2)), rtol=rtol)


BAD = {
    "--batch-size": Training(batch_size=0),
    "--epochs": Training(epochs=0),
    "--lr": Training(lr=-0.1),
    "--momentum": Training(momentum=1.0),
    "--weight-decay": Training(weight_decay=float("nan")),
    "--seed": Training(seed=-1),
    "--skip-nonfinite": Training(skip_nonfinite=-1),
    "--devices": Hardware(devices=0),
    "--heartbeat-timeout": Hardware(heartbeat_timeout=0),
    "--join-timeout": Hardware(join_timeout=0),
}


@pytest.mark.parametrize("option", BAD)
def test_bad_options_are_named(option: str) -> None:
    bad = BAD[option]
    with pytest.raises(ConfigError, match=option):
        validate(Config(training=bad) if isinstance(bad, Training) else Config(hardware=bad))


def test_batch_must_divide_over_the_devices() -> None:
    with pytest.raises(ConfigError, match=r"--batch-size 100 .* 8 devices: expected a multiple, such as 104"):
        check_split(100, 8, 1, 4000)
    with pytest.raises(ConfigError, match=r"8 devices and 3 micro-batches: expected a multiple, such as 120"):
        check_split(100, 8, 3, 4000)
    with pytest.raises(ConfigError, match="only 64 training images"):
        check_split(100, 1, 1, 64)
