"""One training step, the same numbers under `shard_map` and plain `jit`; chunks of steps; evaluation."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from experiments.devices import DATA, replicated, split
from experiments.nonfinite import skipped, unless_skipped, value_and_grad

Batch = dict[str, Any]
Metrics = dict[str, Any]
Partition = Literal["shard_map", "jit"]
Observe = Callable[["TrainState", Any], Metrics]
Inputs = Callable[[Batch], tuple[Any, ...]]  # what a model is called with


class TrainState(NamedTuple):
    """Everything that a step reads and writes, on every device alike."""

    step: jax.Array  # [] int32, steps taken
    params: Any  # float32
    batch_stats: Any  # float32, the running averages
    opt_state: Any
    loss_scale: Any = None  # DynamicScale in float16


class Counts(NamedTuple):
    """Sums over the records of a batch, or whatever else has a label."""

    loss: Any  # [] float32
    correct: Any  # [] float32
    records: Any  # [] float32


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
EvalStep = Callable[[TrainState, Batch], Counts]


def create_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    seed: int,
    mesh: Mesh,
    loss_scale: Callable[[], Any] = lambda: None,
    example: tuple[Any, ...] = (np.zeros((1, 28, 28, 1), np.float32),),
) -> TrainState:
    """The state before the first step, replicated over the mesh; the model is started with `example`."""

    def init() -> TrainState:
        variables = model.init(jax.random.key(seed), *example, train=False)
        params = variables["params"]
        stats = variables.get("batch_stats", {})
        return TrainState(jnp.int32(0), params, stats, optimizer.init(params), loss_scale())

    return jax.jit(init, out_shardings=replicated(mesh))()


def axis_name(partition: Partition) -> str | None:
    """What BN must be told: the mesh axis inside `shard_map`, nothing under `jit`, where the batch is global."""
    return DATA if partition == "shard_map" else None


def images(batch: Batch) -> tuple[jax.Array]:
    """The inputs of a model for images."""
    return (as_float(batch),)


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    partition: Partition,
    observe: Observe,
    inputs: Inputs = images,
) -> TrainStep:
    """A compiled `step(state, batch) -> (state, metrics)`. The state's buffers are donated.

    Args:
        model: built with `axis_name(partition)`.
        optimizer: any Optax transformation; a step that `skip_nonfinite` leaves out changes no statistics either.
        mesh: the devices over which the batch is split.
        partition: "shard_map" (the model names the mesh axis) or "jit" (XLA places the collectives).
        observe: further metrics from the state before the step and the `batch_stats` after it.
        inputs: what the model is called with. The loss is the mean over whatever has a label, weighted.
    """
    over = axis_name(partition)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        def objective(params: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
            variables = {"params": params, "batch_stats": state.batch_stats}
            rngs = {"dropout": dropout_key(state.step, over)}
            logits, updates = model.apply(variables, *inputs(batch), train=True, mutable=["batch_stats"], rngs=rngs)
            counts = count(logits, batch)
            if over:
                # Inside the objective, so that shard_map transposes it: the gradient of the replicated params is then
                # that of the whole batch and needs no psum by hand.
                counts = jax.lax.psum(counts, over)
            return counts.loss / counts.records, (counts.correct / counts.records, updates.get("batch_stats", {}))

        (loss, (accuracy, stats)), grads, loss_scale = value_and_grad(objective, state.params, state.loss_scale)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params, stats = optax.apply_updates(state.params, updates), unless_skipped(opt_state, stats, state.batch_stats)
        metrics = {"loss": loss, "accuracy": accuracy, **skipped(opt_state), **observe(state, stats)}
        return TrainState(state.step + 1, params, stats, opt_state, loss_scale), metrics

    if partition == "shard_map":
        step = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(DATA)), out_specs=P())
    return jax.jit(step, in_shardings=(replicated(mesh), split(mesh)), out_shardings=replicated(mesh), donate_argnums=0)


def dropout_key(step: jax.Array, over: str | None) -> jax.Array:
    """Another one in each step, and on each device that drops elements of its own."""
    key = jax.random.fold_in(jax.random.key(0), step)
    return jax.random.fold_in(key, jax.lax.axis_index(over)) if over else key


def make_eval_step(model: nn.Module, mesh: Mesh, inputs: Inputs = images) -> EvalStep:
    """A compiled `step(state, batch) -> Counts` with the running averages. Records of weight zero do not count."""

    def step(state: TrainState, batch: Batch) -> Counts:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        return count(model.apply(variables, *inputs(batch), train=False), batch)

    # Plain jit in both partitions: with running averages the records are independent and no layer names an axis.
    return jax.jit(step, in_shardings=(replicated(mesh), split(mesh)), out_shardings=replicated(mesh))


def evaluate(step: EvalStep, state: TrainState, batches: Iterable[Batch], mesh: Mesh) -> Metrics:
    """The mean loss and accuracy over every record of weight one."""
    counts = jax.device_get([step(state, place(batch, mesh)) for batch in batches])
    total = Counts(*(float(np.sum(column)) for column in zip(*counts, strict=True)))
    return {"loss": total.loss / total.records, "accuracy": total.correct / total.records}


def chunks(
    step: TrainStep, state: TrainState, batches: Iterator[Batch], mesh: Mesh, ends: Iterable[int]
) -> Iterator[tuple[TrainState, list[Metrics]]]:
    """Trains up to each step number in `ends` in turn and yields there.

    The metrics come over in one transfer per chunk, so that the host never waits for a single step.
    """
    done = int(state.step)
    for end in ends:
        rows = []
        for _ in range(done, end):
            state, metrics = step(state, place(next(batches), mesh))
            rows.append(metrics)
        done = end
        yield state, jax.device_get(rows)


def place(batch: Batch, mesh: Mesh) -> Batch:
    """This process's part of a batch as global arrays, cut over the devices."""
    return {name: jax.make_array_from_process_local_data(split(mesh), part) for name, part in batch.items()}


def as_float(batch: Batch) -> jax.Array:
    """The images between 0 and 1; they travel to the device as bytes."""
    return batch["image"].astype(jnp.float32) / 255


def count(logits: jax.Array, batch: Batch) -> Counts:
    """Sums over the batch; records of weight zero do not count, and without weights all do."""
    weight = batch.get("weight", jnp.ones(batch["label"].shape))
    return Counts((losses(logits, batch) * weight).sum(), (hits(logits, batch) * weight).sum(), weight.sum())


def losses(logits: jax.Array, batch: Batch) -> jax.Array:
    """The cross-entropy of each label."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), batch["label"])


def hits(logits: jax.Array, batch: Batch) -> jax.Array:
    """One where the largest logit is the label's."""
    return (logits.argmax(-1) == batch["label"]).astype(jnp.float32)
