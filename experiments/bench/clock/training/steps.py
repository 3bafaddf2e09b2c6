"""One training step of the same network in every library: forward, backward, SGD with momentum, running averages.

All begin from the parameters that flax.linen draws. A JAX step is compiled ahead and its variables are donated, as a
training loop does; PyTorch's is what its users write, without a compiler.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from experiments.bench.clock import peers  # sets the environment of PyTorch's threads
from experiments.bench.clock.training import resnet20

import flax.linen as nn  # isort: skip
import jax  # isort: skip
import jax.numpy as jnp  # isort: skip
import numpy as np  # isort: skip
import optax  # isort: skip
from flax import nnx  # isort: skip

import bnjax  # isort: skip
from experiments.bench.compiled.networks import ResNet50  # isort: skip
from experiments.models.convolutional import ResNet20  # isort: skip

RATE, MOMENTUM = 0.1, 0.9
TORCH = peers.TORCH_PEERS
LINEN = {
    "bnjax": bnjax.BatchNorm,
    "flax.linen": nn.BatchNorm,
    "flax.linen, accurate": partial(nn.BatchNorm, use_fast_variance=False),
}
NNX = {"bnjax.nnx": bnjax.nnx.BatchNorm, "flax.nnx": nnx.BatchNorm}


class Batch(NamedTuple):
    """What one step learns from."""

    images: np.ndarray  # [N, H, W, 3], float32
    labels: np.ndarray  # [N], int32


class Net(NamedTuple):
    """Parameters and running averages, and the training mode: (params, state, images) -> (logits, new state)."""

    params: Any
    state: Any
    train: peers.Forward


def batch_of(size: int, width: int, classes: int) -> Batch:
    """Noise and random labels: what is timed does not depend on them."""
    rng = np.random.default_rng(0)
    return Batch(rng.standard_normal((size, width, width, 3), np.float32), rng.integers(classes, size=size, dtype="i4"))


# The JAX libraries ----------------------------------------------------------------------------------------------------


def linen_model(norm: Callable[..., nn.Module], network: str, dtype: Any, **size: int) -> tuple[nn.Module, Any]:
    """`network`, resnet20 or resnet50, and the options of a call. `size` of ResNet-20: how many blocks a stage has."""
    if network == "resnet20":
        return ResNet20(partial(norm, dtype=dtype), dtype=dtype, **size), dict(train=True)
    return ResNet50(
        partial(norm, use_running_average=False, dtype=dtype)
    ), {}  # the dtype of activations is its input's


def linen_forward(model: nn.Module, options: Any, dtype: Any) -> peers.Forward:
    """As `Net.train` says."""

    def train(params: Any, state: Any, images: jax.Array) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": state}
        logits, new = model.apply(variables, images.astype(dtype), mutable=["batch_stats"], **options)
        return logits, new["batch_stats"]

    return train


def nnx_net(norm: Callable[..., nnx.Module], variables: Any, dtype: Any, **size: int) -> Net:
    """ResNet-20 with the variables of flax.linen's."""
    build = partial(resnet20.ResNet20, partial(norm, dtype=dtype), dtype=dtype, **size)
    graph, params, state = nnx.split(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))), nnx.Param, ...)
    nnx.replace_by_pure_dict(params, variables["params"])
    nnx.replace_by_pure_dict(state, variables["batch_stats"])

    def train(params: Any, state: Any, images: jax.Array) -> tuple[jax.Array, Any]:
        net = nnx.merge(graph, params, state, copy=True)
        return net(images.astype(dtype)), nnx.state(net, nnx.BatchStat)

    return Net(params, state, train)


def jax_nets(network: str, images: np.ndarray, dtype: Any, **size: int) -> dict[str, Net]:
    """By the names of the table; ResNet-50 in flax.linen alone."""
    models = {name: linen_model(norm, network, dtype, **size) for name, norm in LINEN.items()}
    model, options = models["flax.linen"]
    variables = jax.jit(partial(model.init, **options))(jax.random.key(0), images[:1].astype(dtype))
    start = variables["params"], variables["batch_stats"]
    nets = {name: Net(*start, linen_forward(*model, dtype)) for name, model in models.items()}
    if network == "resnet20":
        nets |= {name: nnx_net(norm, variables, dtype, **size) for name, norm in NNX.items()}
    return nets


def step_of(net: Net) -> Callable[..., Any]:
    """(params, state, momentum, batch) -> the same three after the step, and the loss before it."""
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
    """Parameters, running averages and momentum that a step may overwrite."""
    return jax.tree.map(jnp.array, (net.params, net.state, optax.sgd(RATE, momentum=MOMENTUM).init(net.params)))


def compiled(net: Net, batch: Batch) -> tuple[Any, float, float]:
    """The step, and the seconds that tracing with lowering and compiling took; nothing is left of earlier times."""
    jax.clear_caches()
    arguments = jax.eval_shape(lambda *a: a, *start_of(net), batch)
    begin = time.perf_counter()
    lowered = jax.jit(step_of(net), donate_argnums=(0, 1, 2)).lower(*arguments)
    middle = time.perf_counter()
    executable = lowered.compile()
    return executable, middle - begin, time.perf_counter() - middle


def jax_run(net: Net, executable: Any, batch: Batch) -> Callable[[], float]:
    """Takes a step from where the one before ended; gives its loss."""
    held, batch = list(start_of(net)), jax.tree.map(jnp.asarray, batch)

    def run() -> float:
        *held[:], loss = jax.block_until_ready(executable(*held, batch))
        return loss

    return run


# PyTorch --------------------------------------------------------------------------------------------------------------


def torch_run(net: Any, name: str, batch: Batch, dtype: Any) -> Callable[[], float]:
    """The same of a `resnet20.torch_resnet20`; bfloat16 by `autocast`."""
    import torch

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
    """Bytes of PyTorch's allocator that a step needs at its most, beyond those it began with."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    found = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return int(np.max(np.cumsum([count for _, count in found])))
