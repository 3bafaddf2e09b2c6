"""Builds the programs that are timed: one layer, a ResNet-50 step, and all-reduces, in each library.

A program is a compiled function and its arguments. Those that a training step replaces are donated, and each call
takes what the call before returned.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax
from experiments.bench.compiled import aot, networks

LINEN: dict[str, Callable[..., nn.Module]] = aot.NORMS
NNX: dict[str, Callable[..., nnx.Module]] = {"bnjax.nnx": bnjax.nnx.BatchNorm, "flax.nnx": nnx.BatchNorm}
NAMES = (*LINEN, *NNX)


class Program(NamedTuple):
    """A function to compile, its arguments, and how many of the first ones each call replaces by what it returns."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    replaced: int

    def compile(self) -> Any:
        """Returns the compiled function."""
        donated = tuple(range(self.replaced))
        return jax.jit(self.function, donate_argnums=donated).lower(*self.arguments).compile()

    def runner(self, executable: Any) -> Callable[[], Any]:
        """Returns a function that starts one call; the arguments to replace are copied first, as calls destroy them."""
        state = jax.tree.map(jnp.copy, self.arguments[: self.replaced])
        rest = self.arguments[self.replaced :]

        def run() -> Any:
            nonlocal state
            out = executable(*state, *rest)
            state = out[: self.replaced] if self.replaced else ()
            return out

        return run


def _placed(x: np.ndarray | jax.Array) -> jax.Array:
    """Spreads a batch over all devices."""
    return jax.device_put(x, NamedSharding(Mesh(np.array(jax.devices()), ("data",)), P("data")))


def _everywhere(tree: Any) -> Any:
    """Copies a tree to all devices."""
    return jax.device_put(tree, NamedSharding(Mesh(np.array(jax.devices()), ("data",)), P()))


def layer(name: str, shape: tuple[int, ...]) -> Program:
    """Returns y = ReLU(norm(x)), its derivatives in x, scale and bias, and the running averages; bfloat16."""
    x, dy = (_placed(jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)) for i in range(2))
    if name in LINEN:
        model = networks.Layer(LINEN[name])
        return Program(aot.gradient(model), (_everywhere(model.init(jax.random.key(0), x[:1])), x, dy), 0)
    graph, params, stats = nnx.split(NNX[name](shape[-1], dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), nnx.Param, ...)

    def step(params: Any, stats: Any, x: jax.Array, dy: jax.Array) -> Any:
        def forward(params: Any, x: jax.Array) -> Any:
            module = nnx.merge(graph, params, stats, copy=True)
            return nnx.relu(module(x)), nnx.state(module, nnx.BatchStat)

        y, pull, updates = jax.vjp(forward, params, x, has_aux=True)
        return y, pull(dy), updates

    return Program(step, (*_everywhere((params, stats)), x, dy), 0)


def resnet(name: str, batch: int, size: int, blocks: tuple[int, ...]) -> Program:
    """Returns a training step of ResNet-50 in bfloat16: forward, backward, SGD with momentum, running averages."""
    images = _placed(jax.random.normal(jax.random.key(0), (batch, size, size, 3), jnp.bfloat16))
    labels = _placed(jnp.arange(batch) % 1000)
    optimizer = optax.sgd(0.1, momentum=0.9)
    if name in LINEN:
        model = networks.ResNet50(LINEN[name], blocks=blocks)
        variables = jax.jit(model.init)(jax.random.key(0), images[:1])
        state = _everywhere((variables, optimizer.init(variables["params"])))
        return Program(aot.training(model, optimizer), (*state, images, labels), 2)
    norm = partial(NNX[name], dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    graph, params, stats = nnx.split(networks.NnxResNet50(norm, blocks=blocks, rngs=nnx.Rngs(0)), nnx.Param, ...)

    def step(variables: Any, momentum: Any, images: jax.Array, labels: jax.Array) -> Any:
        params, stats = variables

        def loss(params: Any) -> Any:
            module = nnx.merge(graph, params, stats, copy=True)
            losses = optax.softmax_cross_entropy_with_integer_labels(module(images), labels)
            return losses.mean(), nnx.split(module, nnx.Param, ...)[2]

        grads, stats = jax.grad(loss, has_aux=True)(params)
        changes, momentum = optimizer.update(grads, momentum)
        return (optax.apply_updates(params, changes), stats), momentum

    return Program(step, (*_everywhere(((params, stats), optimizer.init(params))), images, labels), 2)


def pooled(axis_name: str | None, shape: tuple[int, ...]) -> Program:
    """Returns a layer in `shard_map`, forward and backward, with statistics of all devices or (None) of each alone."""
    mesh = Mesh(np.array(jax.devices()), ("data",))

    def local(x: jax.Array) -> jax.Array:
        return jax.grad(lambda x: jnp.sum(jnp.square(bnjax.batch_norm(x, axis_name=axis_name)[0]) * x))(x)

    mapped = jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    return Program(mapped, (_placed(jax.random.normal(jax.random.key(0), shape)),), 0)
