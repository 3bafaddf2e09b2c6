"""Builds the training step, which gives the same numbers under `shard_map` and `jit`; trains in chunks; evaluates."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from experiments.data.pipeline import Batch
from experiments.errors import ConfigError
from experiments.train.devices import DATA, replicated, split
from experiments.train.nonfinite import skipped, unless_skipped, value_and_grad

Metrics = dict[str, Any]
Partition = Literal["shard_map", "jit"]
Observe = Callable[["TrainState", Any], Metrics]
Inputs = Callable[[Batch], tuple[Any, ...]]  # returns the model's arguments for a batch


class TrainState(NamedTuple):
    """Everything that a step reads and writes; replicated over the devices."""

    step: jax.Array  # [] int32, steps taken
    params: Any  # float32
    batch_stats: Any  # float32, the running averages
    opt_state: Any
    loss_scale: Any = None  # DynamicScale in float16
    average: Any = None  # float32, the exponential average of the parameters
    overwritten: Any = None  # the collection whose gradient is its new value, of PowerNorm and MovingAverageBatchNorm


class Counts(NamedTuple):
    """Sums over the labels of a batch (one per image, or one per position of a text)."""

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
    average: bool = False,
) -> TrainState:
    """Creates the state before the first step, replicated over the mesh."""
    # Not jitted: compiling all random initializers of a network takes seconds; without jit each shape is compiled once.
    return placed(initial_state(model, optimizer, seed, loss_scale, example, average), mesh)


def placed(state: TrainState, mesh: Mesh) -> TrainState:
    """Returns the state replicated over the mesh; with several processes, in a first collective of all of them."""
    return jax.device_put(jax.tree.map(jnp.copy, state), replicated(mesh))  # donated arrays must not share a buffer


def initial_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    seed: int,
    loss_scale: Callable[[], Any] = lambda: None,
    example: tuple[Any, ...] = (np.zeros((1, 28, 28, 1), np.float32),),
    average: bool = False,
) -> TrainState:
    """Returns the state before the first step; `example` holds the inputs for `model.init`, and `average` asks for an
    average of the parameters.
    """
    variables = model.init(jax.random.key(seed), *example, train=False)
    params = variables["params"]
    stats, overwritten = variables.get("batch_stats", {}), variables.get(OVERWRITE_WITH_GRADIENT)
    mean = params if average else None
    return TrainState(jnp.int32(0), params, stats, optimizer.init(params), loss_scale(), mean, overwritten)


def axis_name(partition: Partition) -> str | None:
    """Returns the axis name for BN: the mesh axis under `shard_map`, None under `jit`, where the batch is global."""
    return DATA if partition == "shard_map" else None


def images(batch: Batch) -> tuple[jax.Array]:
    """Returns the arguments of an image model: the images as floats between 0 and 1."""
    return (as_float(batch),)


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    partition: Partition,
    observe: Observe,
    inputs: Inputs = images,
    accumulate: int = 1,
    label_smoothing: float = 0.0,
    ema: float = 0.0,
) -> TrainStep:
    """Compiles `step(state, batch) -> (state, metrics)`; the buffers of the state are donated.

    Args:
        model: built with `axis_name(partition)`.
        optimizer: any Optax transformation; a step that `skip_nonfinite` skips does not change the statistics either.
        mesh: the devices over which the batch is split.
        partition: "shard_map" (the model names the mesh axis) or "jit" (XLA places the collectives).
        observe: further metrics from the state before the step and the `batch_stats` after it.
        inputs: returns the model's arguments for a batch. The loss is the weighted mean over all labels.
        accumulate: micro-batches that a batch is cut into, each with statistics of its own: gradients and running
            averages are the means over them.
        label_smoothing: part of the label that the loss spreads over all classes.
        ema: decay of the average of the parameters, if the state has one; at first it is (1 + t)/(10 + t) in step t.

    Raises:
        ConfigError: in the first step, for micro-batches or a scaled loss with a model whose gradient state follows
            one batch after the other (PowerNorm, MovingAverageBatchNorm).
    """
    over = mesh.axis_names if partition == "shard_map" else None

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if state.overwritten is not None and (accumulate > 1 or state.loss_scale is not None):
            raise ConfigError("PowerNorm and MovingAverageBatchNorm train without micro-batches and in no float16")

        def objective(trained: tuple[Any, Any], batch: Batch, part: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
            params, overwritten = trained
            variables = {"params": params, "batch_stats": state.batch_stats}
            variables |= {} if overwritten is None else {OVERWRITE_WITH_GRADIENT: overwritten}
            rngs = {"dropout": dropout_key(state.step * accumulate + part, over)}
            logits, updates = model.apply(variables, *inputs(batch), train=True, mutable=["batch_stats"], rngs=rngs)
            counts = count(logits, batch, label_smoothing)
            if over:
                # The psum is inside the objective, so that shard_map transposes it: the gradient of the replicated
                # params is then that of the whole batch, without another psum.
                counts = jax.lax.psum(counts, over)
            return counts.loss / counts.records, (counts.correct / counts.records, updates.get("batch_stats", {}))

        def differentiate(scale: Any, part: tuple[Batch, Any]) -> tuple[Any, Any]:
            trained = state.params, state.overwritten
            value, grads, scale = value_and_grad(lambda trained: objective(trained, *part), trained, scale)
            return scale, (value, grads)

        loss_scale, found = mean_over_parts(differentiate, state.loss_scale, batch, accumulate)
        (loss, (accuracy, stats)), (grads, overwritten) = found
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        stats, overwritten = unless_skipped(opt_state, (stats, overwritten), (state.batch_stats, state.overwritten))
        metrics = {"loss": loss, "accuracy": accuracy, **skipped(opt_state), **observe(state, stats)}
        average = averaged(state, params, ema)
        return TrainState(state.step + 1, params, stats, opt_state, loss_scale, average, overwritten), metrics

    if partition == "shard_map":
        step = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(over)), out_specs=P())
    return jax.jit(step, in_shardings=(replicated(mesh), split(mesh)), out_shardings=replicated(mesh), donate_argnums=0)


def averaged(state: TrainState, params: Any, decay: float) -> Any:
    """Returns the exponential average of the parameters after a step, or None if the state has none."""
    if state.average is None:
        return None
    kept = jnp.minimum(decay, (1 + state.step) / (10 + state.step))  # so that the first values do not weigh for long
    return optax.incremental_update(params, state.average, 1 - kept)


def mean_over_parts(
    differentiate: Callable[[Any, tuple[Batch, Any]], tuple[Any, Any]], carry: Any, batch: Batch, parts: int
) -> tuple[Any, Any]:
    """Calls `differentiate(carry, (micro-batch, index))` on each micro-batch in turn; returns the last carry and the
    mean result.
    """
    if parts == 1:
        return differentiate(carry, (batch, 0))

    def body(carry: tuple[Any, Any], part: tuple[Batch, Any]) -> tuple[tuple[Any, Any], None]:
        (carry, total) = carry
        carry, found = differentiate(carry, part)
        return (carry, jax.tree.map(jnp.add, total, found)), None

    # Strided, so that under jit each device takes its micro-batches from the records it holds, as in shard_map.
    cut = jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), batch)
    _, shapes = jax.eval_shape(differentiate, carry, (jax.tree.map(lambda a: a[0], cut), jnp.int32(0)))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    (carry, total), _ = jax.lax.scan(body, (carry, zeros), (cut, jnp.arange(parts)))
    return carry, jax.tree.map(lambda a: a / parts, total)


def dropout_key(step: jax.Array, over: tuple[str, ...] | None) -> jax.Array:
    """Derives a dropout key that differs in each step and, if `over` names mapped axes, on each device."""
    key = jax.random.fold_in(jax.random.key(0), step)
    return jax.random.fold_in(key, jax.lax.axis_index(over)) if over else key


def make_eval_step(model: nn.Module, mesh: Mesh, inputs: Inputs = images) -> EvalStep:
    """Compiles `step(state, batch) -> Counts`, which uses the running averages; records of weight zero do not count."""

    def step(state: TrainState, batch: Batch) -> Counts:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        return count(model.apply(variables, *inputs(batch), train=False), batch)

    # Plain jit in both partitions: with running averages the records are independent and no layer names an axis.
    return jax.jit(step, in_shardings=(replicated(mesh), split(mesh)), out_shardings=replicated(mesh))


def evaluate(step: EvalStep, state: TrainState, batches: Iterable[Batch], mesh: Mesh) -> Metrics:
    """Computes the mean loss and accuracy over all records of weight one."""
    counts = jax.device_get([step(state, place(batch, mesh)) for batch in batches])
    total = Counts(*(float(np.sum(column)) for column in zip(*counts, strict=True)))
    return {"loss": total.loss / total.records, "accuracy": total.correct / total.records}


def chunks(
    step: TrainStep, state: TrainState, batches: Iterator[Batch], mesh: Mesh, ends: Iterable[int]
) -> Iterator[tuple[TrainState, list[Metrics]]]:
    """Trains up to each step number in `ends` in turn, and there yields the state and the metrics of the steps since.

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
    """Assembles global arrays, split over the devices, from the part of the batch that this process holds."""
    return {name: jax.make_array_from_process_local_data(split(mesh), part) for name, part in batch.items()}


def as_float(batch: Batch) -> jax.Array:
    """Converts uint8 images to float32 between 0 and 1; they are transferred to the device as bytes."""
    return batch["image"].astype(jnp.float32) / 255


def count(logits: jax.Array, batch: Batch, label_smoothing: float = 0.0) -> Counts:
    """Sums loss, correct predictions and weights over the batch; without weights, every record counts as one."""
    weight = batch.get("weight", jnp.ones(batch["label"].shape))
    loss = losses(logits, batch, label_smoothing)
    return Counts((loss * weight).sum(), (hits(logits, batch) * weight).sum(), weight.sum())


def losses(logits: jax.Array, batch: Batch, label_smoothing: float = 0.0) -> jax.Array:
    """Computes the cross-entropy of each label, of which a part may be spread over all classes."""
    if label_smoothing:
        labels = optax.smooth_labels(jax.nn.one_hot(batch["label"], logits.shape[-1]), label_smoothing)
        return optax.softmax_cross_entropy(logits.astype(jnp.float32), labels)
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), batch["label"])


def hits(logits: jax.Array, batch: Batch) -> jax.Array:
    """Returns 1 where the largest logit is the label's, else 0."""
    return (logits.argmax(-1) == batch["label"]).astype(jnp.float32)
