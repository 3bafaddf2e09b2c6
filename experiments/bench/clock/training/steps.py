"""Builds one training step of the same network in every library: forward, backward, SGD with momentum, averages.

All start from the parameters that flax.linen draws. A JAX step is compiled ahead of time and its variables are donated,
as in a training loop; PyTorch runs eagerly, without a compiler.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import bnjax
from experiments.bench.clock import peers
from experiments.bench.clock.training import resnet20
from experiments.bench.compiled.networks import ResNet50
from experiments.models.convolutional import ResNet20

RATE, MOMENTUM = 0.1, 0.9
TORCH = peers.TORCH_PEERS
LINEN = {
    "bnjax": bnjax.BatchNorm,
    "flax.linen": nn.BatchNorm,
    "flax.linen, accurate": partial(nn.BatchNorm, use_fast_variance=False),
}
NNX = {"bnjax.nnx": bnjax.nnx.BatchNorm, "flax.nnx": nnx.BatchNorm}


class Batch(NamedTuple):
    """The images and labels of one training step."""

    images: np.ndarray  # [N, H, W, 3], float32
    labels: np.ndarray  # [N], int32


class Net(NamedTuple):
    """A network: parameters, running averages, and its training mode `(params, state, images) -> (logits,
    new state)`.
    """

    params: Any
    state: Any
    train: peers.Forward


def batch_of(size: int, width: int, classes: int) -> Batch:
    """Draws random images and labels; the time of a step does not depend on their values."""
    rng = np.random.default_rng(0)
    return Batch(rng.standard_normal((size, width, width, 3), np.float32), rng.integers(classes, size=size, dtype="i4"))


# The JAX libraries ----------------------------------------------------------------------------------------------------


def linen_model(norm: Callable[..., nn.Module], network: str, dtype: Any, **size: int) -> tuple[nn.Module, Any]:
    """Builds `network`, resnet20 or resnet50, and the options of its call. `size` of ResNet-20: blocks per stage."""
    if network == "resnet20":
        return ResNet20(partial(norm, dtype=dtype), dtype=dtype, **size), dict(train=True)
    return ResNet50(
        partial(norm, use_running_average=False, dtype=dtype)
    ), {}  # the dtype of activations is its input's


def linen_forward(model: nn.Module, options: Any, dtype: Any) -> peers.Forward:
    """Returns the training mode of a linen model: `(params, state, images) -> (logits, new state)`."""

    def train(params: Any, state: Any, images: jax.Array) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": state}
        logits, new = model.apply(variables, images.astype(dtype), mutable=["batch_stats"], **options)
        return logits, new["batch_stats"]

    return train


def nnx_net(norm: Callable[..., nnx.Module], variables: Any, dtype: Any, **size: int) -> Net:
    """Builds ResNet-20 in flax.nnx with the variables of the flax.linen network."""
    build = partial(resnet20.ResNet20, partial(norm, dtype=dtype), dtype=dtype, **size)
    graph, params, state = nnx.split(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))), nnx.Param, ...)
    nnx.replace_by_pure_dict(params, variables["params"])
    nnx.replace_by_pure_dict(state, variables["batch_stats"])

    def train(params: Any, state: Any, images: jax.Array) -> tuple[jax.Array, Any]:
        net = nnx.merge(graph, params, state, copy=True)
        return net(images.astype(dtype)), nnx.state(net, nnx.BatchStat)

    return Net(params, state, train)


def jax_nets(network: str, images: np.ndarray, dtype: Any, **size: int) -> dict[str, Net]:
    """Builds the network in every JAX library, by the names of the table; ResNet-50 in flax.linen only."""
    models = {name: linen_model(norm, network, dtype, **size) for name, norm in LINEN.items()}
    model, options = models["flax.linen"]
    variables = jax.jit(partial(model.init, **options))(jax.random.key(0), images[:1].astype(dtype))
    start = variables["params"], variables["batch_stats"]
    nets = {name: Net(*start, linen_forward(*model, dtype)) for name, model in models.items()}
    if network == "resnet20":
        nets |= {name: nnx_net(norm, variables, dtype, **size) for name, norm in NNX.items()}
    return nets


def step_of(net: Net) -> Callable[..., Any]:
    """Returns a step `(params, state, momentum, batch) -> (params, state, momentum, loss)`; the loss is before the
    step.
    """
    optimizer = optax.sgd(RATE, momentum=MOMENTUM)

    def step(params: Any, state: Any, momentum: Any, batch: Batch) -> Any:
        def loss_of(params: Any) -> tuple[jax.Array, Any]:
            logits, new = net.train(params, state, batch.images)
            logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean(), new

        (loss, new), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        changes, momentum = optimizer.update(grads, momentum)
        return optax.apply_updates(params, changes), new, momentum, loss

    return step


def start_of(net: Net) -> tuple[Any, Any, Any]:
    """Returns copies of parameters, running averages and momentum that a step may overwrite."""
    return jax.tree.map(jnp.array, (net.params, net.state, optax.sgd(RATE, momentum=MOMENTUM).init(net.params)))


def compiled(net: Net, batch: Batch) -> tuple[Any, float, float]:
    """Compiles the step with empty caches; returns it, the seconds of tracing and lowering, and those of compiling."""
    jax.clear_caches()
    arguments = jax.eval_shape(lambda *a: a, *start_of(net), batch)
    begin = time.perf_counter()
    lowered = jax.jit(step_of(net), donate_argnums=(0, 1, 2)).lower(*arguments)
    middle = time.perf_counter()
    executable = lowered.compile()
    return executable, middle - begin, time.perf_counter() - middle


def jax_run(net: Net, executable: Any, batch: Batch) -> Callable[[], float]:
    """Returns a function that takes the next training step and returns its loss."""
    held, batch = list(start_of(net)), jax.tree.map(jnp.asarray, batch)

    def run() -> float:
        *held[:], loss = jax.block_until_ready(executable(*held, batch))
        return loss

    return run


# PyTorch --------------------------------------------------------------------------------------------------------------


def torch_run(net: Any, name: str, batch: Batch, dtype: Any) -> Callable[[], float]:
    """Returns a function that takes the next training step of a PyTorch network; bfloat16 runs under `autocast`."""
    torch = peers.import_torch()
    torch.set_num_threads(os.cpu_count() or 1)
    memory = torch.channels_last if "last" in name else torch.contiguous_format
    net = net.to(memory_format=memory).train()
    kind = next(net.parameters()).dtype
    images = torch.from_numpy(batch.images).permute(0, 3, 1, 2).to(kind).contiguous(memory_format=memory)
    labels = torch.from_numpy(batch.labels).long()
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE, momentum=MOMENTUM)

    def run() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == jnp.bfloat16):
            logits = net(images)
        loss = torch.nn.functional.cross_entropy(logits.to(kind), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return run


def torch_memory(run: Callable[[], float]) -> int:
    """Returns the peak bytes that PyTorch's allocator needs during a step, above those in use before it."""
    profiler = peers.import_torch().profiler
    with profiler.profile(activities=[profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    found = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return int(np.max(np.cumsum([count for _, count in found])))
