"""Brings together what a training run uses: its processes, data, network, optimizer, and compiled steps."""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from grain.sharding import ShardByJaxProcess, ShardOptions

from bnjax.linen import BatchNorm
from experiments.data.pipeline import Batch
from experiments.data.sets import DataSet, open_set
from experiments.errors import ConfigError
from experiments.models.convolutional import ConvNet, ResNet20
from experiments.models.residual import BLOCKS, ResNet
from experiments.train import devices, nonfinite
from experiments.train.cluster import detect
from experiments.train.cluster.meet import meet
from experiments.train.config import Config, Training, check_split, settings, validate
from experiments.train.drift import drift
from experiments.train.loop import (
    EvalStep,
    Metrics,
    Partition,
    TrainState,
    TrainStep,
    initial_state,
    make_eval_step,
    make_train_step,
    placed,
)
from experiments.train.optimizer import OPTIMIZERS, warmup_cosine

EPSILON = 1e-5


class Session(NamedTuple):
    """Everything that a training run uses and that does not change from step to step."""

    config: Config
    mesh: jax.sharding.Mesh
    data: DataSet
    shard: ShardOptions
    batches: "Timed"
    train_step: TrainStep
    eval_step: EvalStep
    epoch: int  # steps in an epoch
    total: int  # steps in the whole training


class Timed(Iterator[Batch]):
    """Passes batches on, and adds up the seconds in which the program waits for them."""

    def __init__(self, batches: Any):
        self._batches, self.seconds = batches, 0.0

    def __next__(self) -> Batch:
        began = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.seconds += time.perf_counter() - began

    def get_state(self) -> Any:
        """Returns the position in the data."""
        return self._batches.get_state()

    def set_state(self, state: Any) -> None:
        """Moves to a position in the data."""
        self._batches.set_state(state)


def join(config: Config) -> DataSet:
    """Opens the data, and joins the other processes if there are any; what is wrong in one of them ends all."""
    hardware, training, files = config.hardware, config.training, config.files
    member = detect.member(hardware)
    try:
        validate(config)
        data = open_set(
            training.data,
            files.data_dir,
            max_shift=training.max_shift,
            flip=training.flip,
            image_size=training.image_size,
            workers=files.workers,
            damaged=files.damaged,
        )
    except ConfigError as error:
        if member:
            meet(member, {}, hardware.join_timeout, failed=str(error))
        raise
    if member:
        sizes = {"number of training images": data.train, "number of test images": data.test}
        meet(member, settings(config) | sizes | devices.versions(), hardware.join_timeout)
    devices.start(hardware, member)
    return data


def norm_options(partition: Partition, group: int | None) -> dict[str, Any]:
    """Returns the names of mesh axes that BN takes: along which it normalises, and along which it averages besides."""
    if partition == "jit":
        return {}
    if group is None:
        return {"axis_name": devices.DATA}
    return {"axis_name": devices.DATA, "stats_axis_name": devices.GROUPS}


def build_model(training: Training, partition: Partition, classes: int = 10) -> nn.Module:
    """Builds the network; its BN layers compute statistics over the whole batch, or over groups of devices."""
    dtype = jnp.dtype(training.precision)
    names = norm_options(partition, training.bn_group)
    norm = partial(BatchNorm, momentum=training.momentum, epsilon=EPSILON, dtype=dtype, **names)
    if training.model in BLOCKS:
        return ResNet(norm, training.width, classes, BLOCKS[training.model], training.zero_scale, dtype)
    network = {"convnet": ConvNet, "resnet20": ResNet20}[training.model]
    widths = training.width, 2 * training.width, 4 * training.width
    return network(norm, widths=widths, classes=classes, dtype=dtype)


def build(config: Config, data: DataSet) -> tuple[Session, TrainState]:
    """Builds the batches, the compiled steps and the initial state for the devices of this machine."""
    training, partition = config.training, config.hardware.partition
    flat = devices.data_mesh(config.hardware.devices)
    check_split(training.batch_size, flat.size, training.accumulate, data.train, training.bn_group)
    mesh = devices.data_mesh(config.hardware.devices, training.bn_group)
    shard, epoch = ShardByJaxProcess(), data.train // training.batch_size
    schedule = warmup_cosine(training.lr, training.epochs * epoch, training.warmup)
    optimizer = nonfinite.skip_nonfinite(OPTIMIZERS[training.optimizer](schedule, training.weight_decay))
    model = build_model(training, partition, data.classes)

    def observe(state: TrainState, stats: Any) -> Metrics:
        """Returns further metrics of a step: its learning rate, and the drift of each BN layer."""
        layers = drift(state.batch_stats, stats, momentum=training.momentum, epsilon=EPSILON)
        return {"learning_rate": schedule(state.step - state.opt_state.total_notfinite), "drift": layers}

    train_step = make_train_step(
        model,
        optimizer,
        mesh,
        partition,
        observe,
        accumulate=training.accumulate,
        label_smoothing=training.label_smoothing,
        ema=training.ema,
    )
    batches = Timed(data.training(training.batch_size, training.epochs, training.seed, shard))
    eval_step = make_eval_step(model, mesh)
    session = Session(config, mesh, data, shard, batches, train_step, eval_step, epoch, training.epochs * epoch)
    scale = nonfinite.initial_scale if training.precision == "float16" else lambda: None
    example = (np.zeros((1, *data.shape), np.float32),)
    state = initial_state(model, optimizer, training.seed, scale, example, average=training.ema > 0)
    devices.wait_for_all(config.hardware.join_timeout)
    return session, placed(state, mesh)
