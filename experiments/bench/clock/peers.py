"""Builds the same layer in every library, for training and evaluation, each in the layout that it is made for.

A JAX layer is a pair of functions of (parameters, state, x). Its compiled step writes into donated buffers, because
page faults of new memory would cost more than the arithmetic. PyTorch is timed separately, because its idle threads
keep spinning on the cores that the next program needs.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import bnjax

Forward = Callable[..., tuple[jax.Array, Any]]  # (params, state, x), and mask= if the layer takes one
MODES = ("forward", "forward + backward", "forward + backward, masked", "evaluation")


class Peer(NamedTuple):
    """A layer of one library: its parameters and state, and what it does with x in training and evaluation."""

    params: Any
    state: Any
    train: Forward
    evaluate: Callable[[Any, Any, jax.Array], jax.Array]


def _linen(module: Callable[..., nn.Module], shape: Sequence[int], dtype: Any) -> Peer:
    """Builds the layer of a linen module."""

    def apply(params: Any, state: Any, x: jax.Array, **options: Any) -> Any:
        return module(dtype=dtype).apply({"params": params, "batch_stats": state}, x, **options)

    zeros, ones = jnp.zeros(shape[-1]), jnp.ones(shape[-1])
    params, state = dict(scale=ones, bias=zeros), dict(mean=zeros, var=ones)
    train = partial(apply, use_running_average=False, mutable=["batch_stats"])
    return Peer(params, state, train, partial(apply, use_running_average=True))


def _nnx(module: Callable[..., nnx.Module], shape: Sequence[int], dtype: Any) -> Peer:
    """Builds the layer of an nnx module."""
    graph, params, state = nnx.split(module(shape[-1], dtype=dtype, rngs=nnx.Rngs(0)), nnx.Param, ...)

    def train(params: Any, state: Any, x: jax.Array, **options: Any) -> tuple[jax.Array, Any]:
        layer = nnx.merge(graph, params, state, copy=True)
        return layer(x, use_running_average=False, **options), nnx.state(layer, nnx.BatchStat)

    def evaluate(params: Any, state: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graph, params, state)(x, use_running_average=True)

    return Peer(params, state, train, evaluate)


def _haiku(shape: Sequence[int], dtype: Any) -> Peer:
    """Builds Haiku's layer."""
    import haiku as hk

    def layer(x: jax.Array, is_training: bool) -> jax.Array:
        return hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.99)(x, is_training)

    transformed = hk.without_apply_rng(hk.transform_with_state(layer))
    params, state = transformed.init(None, jnp.zeros((1, *shape[1:]), dtype), True)
    train = lambda p, s, x: transformed.apply(p, s, x, True)  # noqa: E731
    return Peer(params, state, train, lambda p, s, x: transformed.apply(p, s, x, False)[0])


def _equinox(shape: Sequence[int], dtype: Any) -> Peer:
    """Builds Equinox's layer, which takes one example at a time, channels first."""
    import equinox as eqx

    layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(shape[1], axis_name="batch", mode="batch")
    params, static = eqx.partition(layer, eqx.is_inexact_array)

    def train(params: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        over = jax.vmap(eqx.combine(params, static), axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        return over(x, state)

    def evaluate(params: Any, state: Any, x: jax.Array) -> jax.Array:
        return jax.vmap(lambda x: eqx.nn.inference_mode(eqx.combine(params, static))(x, state)[0], axis_name="batch")(x)

    return Peer(params, state, train, evaluate)


def _keras(shape: Sequence[int], dtype: Any) -> Peer:
    """Builds Keras' layer on its JAX backend."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    policy = "mixed_bfloat16" if dtype == jnp.bfloat16 else "float32"
    layer = keras.layers.BatchNormalization(dtype=policy)
    layer.build((None, *shape[1:]))
    params, state = (
        [jnp.asarray(v.value) for v in vs] for vs in (layer.trainable_variables, layer.non_trainable_variables)
    )
    evaluate = lambda p, s, x: layer.stateless_call(p, s, x, training=False)[0]  # noqa: E731

    def train(params: Any, state: Any, x: jax.Array, mask: jax.Array | None = None) -> tuple[jax.Array, Any]:
        mask = None if mask is None else mask[..., 0]
        return layer.stateless_call(params, state, x, training=True, mask=mask)

    return Peer(params, state, train, evaluate)


_JAX: dict[str, tuple[str, Callable[..., Peer]]] = {
    "bnjax": ("bnjax", partial(_linen, bnjax.BatchNorm)),
    "flax.linen": ("flax", partial(_linen, nn.BatchNorm)),
    "flax.linen, accurate": ("flax", partial(_linen, partial(nn.BatchNorm, use_fast_variance=False))),
    "flax.nnx": ("flax", partial(_nnx, nnx.BatchNorm)),
    "haiku": ("haiku", _haiku),
    "equinox": ("equinox", _equinox),
    "keras": ("keras", _keras),
}
CHANNELS_FIRST = {"equinox", "torch"}
WITHOUT_MASK = {"haiku", "equinox", "torch", "torch, channels last"}
JAX_PEERS, TORCH_PEERS = tuple(_JAX), ("torch", "torch, channels last")


def left_out() -> list[str]:
    """Returns the libraries that are not installed."""
    return [name for name in ("haiku", "equinox", "keras", "torch") if find_spec(name) is None]


def jax_run(name: str, mode: str, x: np.ndarray, dy: np.ndarray, dtype: Any) -> Callable[[], None]:
    """Returns a function that runs one step of a JAX library's layer."""
    if name in CHANNELS_FIRST:
        x, dy = (np.ascontiguousarray(np.moveaxis(a, -1, 1)) for a in (x, dy))
    peer = _JAX[name][1](x.shape, dtype)
    mask = jnp.asarray(np.random.default_rng(2).random((*x.shape[:-1], 1)) < 7 / 8) if "masked" in mode else None
    return compiled_run(partial(_step, peer, mode), (peer.params, peer.state, mask), x, dy, dtype)


def compiled_run(
    step: Callable[..., Any], constant: Any, x: np.ndarray, dy: np.ndarray, dtype: Any
) -> Callable[[], None]:
    """Returns a function that runs `step(*constant, x, dy)`; its two large results reuse the buffers of the previous
    call.
    """
    x, dy = jnp.asarray(x, dtype), jnp.asarray(dy, dtype)
    program = jax.jit(lambda c, x, dy, *_: step(*c, x, dy), donate_argnums=(3, 4), keep_unused=True)
    shapes = jax.eval_shape(step, *constant, x, dy)[:2]
    held = [jnp.zeros(s.shape, s.dtype) for s in shapes]

    def run() -> None:
        out = jax.block_until_ready(program(constant, x, dy, *held))
        held[:] = out[:2]

    return run


def _step(peer: Peer, mode: str, params: Any, state: Any, mask: jax.Array | None, x: jax.Array, dy: jax.Array) -> Any:
    """Runs one step: returns y, dx (or a zero if the mode has no backward pass), and what else a training
    step updates.
    """
    options = {} if mask is None else dict(mask=mask)
    if mode == "evaluation":
        return peer.evaluate(params, state, x), jnp.zeros(())
    if mode == "forward":
        y, new = peer.train(params, state, x)
        return y, jnp.zeros(()), new
    y, pullback, new = jax.vjp(lambda p, x: peer.train(p, state, x, **options), params, x, has_aux=True)
    grads, dx = pullback(dy.astype(y.dtype))
    return y, dx, grads, new


def floor_run(mode: str, x: np.ndarray, dy: np.ndarray, dtype: Any) -> Callable[[], None]:
    """Returns a function that makes the fewest passes over memory: two forward and two backward in training, without a
    mask.
    """
    rows = tuple(range(x.ndim - 1))

    def step(v: jax.Array, x: jax.Array, dy: jax.Array) -> Any:
        if mode == "evaluation":
            return x * v, jnp.zeros(())
        y = x * v + jnp.sum(x, rows, dtype=jnp.float32).astype(x.dtype) * jnp.asarray(1e-9, x.dtype)
        if mode == "forward":
            return y, jnp.zeros(())
        pull = jnp.sum(dy * x, rows, dtype=jnp.float32).astype(x.dtype)
        return y, dy * v + x * (pull * jnp.asarray(1e-9, x.dtype))  # the factors order the passes

    return compiled_run(step, (jnp.ones(x.shape[-1], dtype),), x, dy, dtype)


def import_torch() -> ModuleType:
    """Imports PyTorch with idle OpenMP threads that sleep: by default they spin on the cores that the next program
    needs.

    OpenMP reads these settings when PyTorch is first imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    import torch

    return torch


def torch_run(name: str, mode: str, x: np.ndarray, dy: np.ndarray, dtype: Any) -> Callable[[], None]:
    """Returns a function that runs PyTorch's layer; `backward` allocates a new dx, which its caching allocator makes
    cheap.
    """
    torch = import_torch()
    torch.set_num_threads(os.cpu_count() or 1)
    kind = torch.bfloat16 if dtype == jnp.bfloat16 else torch.float32
    memory = torch.channels_last if "last" in name and x.ndim == 4 else torch.contiguous_format
    x, dy = (torch.from_numpy(np.ascontiguousarray(np.moveaxis(a, -1, 1))).to(kind) for a in (x, dy))
    x, dy = (a.contiguous(memory_format=memory) for a in (x, dy))
    layer = (torch.nn.BatchNorm2d if x.ndim == 4 else torch.nn.BatchNorm1d)(x.shape[1])
    layer.train(mode != "evaluation")
    x.requires_grad_(mode == "forward + backward")

    def run() -> None:
        with torch.set_grad_enabled(mode == "forward + backward"):
            y = layer(x)
        if mode == "forward + backward":
            x.grad = None
            y.backward(dy)

    return run
