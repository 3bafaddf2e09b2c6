"""Batch normalization of rows, x: `[N, C]`, by Pallas kernels that read x once: an experiment, not part of bnjax.

Channels do not meet, so each 128 of them are a block of their own, [N, 128], which stays in VMEM between the sums and
what follows from them: forward x is read and y written, backward x and dy are read and dx written, 5 passes over main
memory in all. `experiments.bench.compiled.pallas_rows` says what that is worth.

The statistics are those of one chip. Over several chips a block would have to wait in VMEM while its sums travel, by
remote DMA between the chips, inside the kernel; stopped there for XLA's all-reduce it reads x a second time, as XLA
does. Under plain jit with a sharded batch it does not compile: XLA cannot partition a Mosaic kernel.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import bnjax

LANES = 128  # channels of a block
CHUNK = 256  # rows that are in registers together
MIB = 2**20
VMEM = 128 * MIB  # of one v5e chip; a kernel may use 16 MiB unless it asks for more


class How(NamedTuple):
    """What the kernels are compiled for."""

    relu: bool = False  # y = max(BN(x), 0)
    forward: bool = True  # or the backward kernel alone, behind XLA's forward pass
    epsilon: float = 1e-5
    vmem: int | None = VMEM
    interpret: bool = False


# In the kernels x, y, dy and dx are [N, 128] in VMEM, vectors [1, 128] in float32.


def _by_chunks(rows: int, body: Callable[..., Any], carry: Any) -> Any:
    """body(rows of a chunk, carry) over all chunks: no float32 copy of the block."""
    length = math.gcd(rows, CHUNK)
    chunk = lambda i, carry: body(pl.ds(pl.multiple_of(i * length, length), length), carry)  # noqa: E731
    return jax.lax.fori_loop(0, rows // length, chunk, carry)


def _sums(rows: int, *terms: Callable[..., jax.Array]) -> tuple[jax.Array, ...]:
    """Of each term, a function of the chunk, over all rows."""
    add = lambda at, carry: tuple(c + jnp.sum(f(at), 0, keepdims=True) for c, f in zip(carry, terms, strict=True))  # noqa: E731
    return _by_chunks(rows, add, tuple(jnp.zeros((1, LANES), jnp.float32) for _ in terms))


def _store(ref: Any, value: Callable[..., jax.Array]) -> None:
    def write(at: Any, carry: int) -> int:
        ref[at, :] = value(at).astype(ref.dtype)
        return carry

    _by_chunks(ref.shape[0], write, 0)


def _forward(how: How, x: Any, scale: Any, bias: Any, y: Any, mean: Any, var: Any) -> None:
    """One read of main memory, three of VMEM: mean and variance in two passes, as exact as can be."""
    rows, f32 = x.shape[0], lambda at: x[at, :].astype(jnp.float32)
    m = _sums(rows, f32)[0] / rows
    v = _sums(rows, lambda at: jnp.square(f32(at) - m))[0] / rows
    a, b = jax.lax.rsqrt(v + how.epsilon) * scale[...], bias[...]
    affine = lambda at: (f32(at) - m) * a + b  # noqa: E731
    _store(y, (lambda at: jnp.maximum(affine(at), 0)) if how.relu else affine)
    mean[...], var[...] = m, v


def _backward(
    how: How, x: Any, dy: Any, scale: Any, bias: Any, mean: Any, var: Any, dx: Any, dscale: Any, dbias: Any
) -> None:
    """dx = a·(dy − Σdy/N − xhat·Σ(dy·xhat)/N); ReLU's derivative from x, so that y need not be kept."""
    rows, m, rstd = x.shape[0], mean[...], jax.lax.rsqrt(var[...] + how.epsilon)
    a, b = rstd * scale[...], bias[...]
    centred = lambda at: x[at, :].astype(jnp.float32) - m  # noqa: E731

    def pulled(at: Any) -> jax.Array:
        d = dy[at, :].astype(jnp.float32)
        return jnp.where(centred(at) * a + b > 0, d, 0) if how.relu else d

    total, product = _sums(rows, pulled, lambda at: pulled(at) * centred(at))
    slope = product * rstd * rstd / rows
    _store(dx, lambda at: (pulled(at) - total / rows - centred(at) * slope) * a)
    dscale[...], dbias[...] = product * rstd, total


def _call(kernel: Any, how: How, out: Sequence[jax.ShapeDtypeStruct], *args: jax.Array) -> Any:
    """The kernel on each 128 channels by themselves; one block is fetched while another is worked on."""
    spec = lambda a: pl.BlockSpec((a.shape[0], LANES), lambda i: (0, i))  # noqa: E731
    windows = sum(2 * a.shape[0] * LANES * a.dtype.itemsize for a in (*args, *out))
    limit = how.vmem and min(how.vmem, windows + 8 * MIB)
    return pl.pallas_call(
        partial(kernel, how),
        tuple(out),
        grid=(pl.cdiv(args[0].shape[1], LANES),),
        in_specs=[spec(a) for a in args],
        out_specs=[spec(a) for a in out],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=limit),
        interpret=how.interpret,
    )(*args)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def batch_norm(how: How, x: jax.Array, scale: jax.Array, bias: jax.Array) -> tuple[jax.Array, ...]:
    """y, mean and var of x: `[N, C]` over its rows, on one device; mean and var have no derivative."""
    return _batch_norm_fwd(how, x, scale, bias)[0]


def _shapes(x: jax.Array) -> tuple[jax.ShapeDtypeStruct, ...]:
    vector = jax.ShapeDtypeStruct((1, x.shape[1]), jnp.float32)
    return jax.ShapeDtypeStruct(x.shape, x.dtype), vector, vector


def _batch_norm_fwd(how: How, x: jax.Array, scale: jax.Array, bias: jax.Array) -> Any:
    if how.forward:
        y, mean, var = _call(_forward, how, _shapes(x), x, scale[None], bias[None])
    else:
        activation = nn.relu if how.relu else None
        y, m = bnjax.batch_norm(x, scale, bias, epsilon=how.epsilon, dtype=x.dtype, activation=activation)
        mean, var = m.mean[None], m.var[None]
    return (y, mean[0], var[0]), (x, scale[None], bias[None], mean, var)


def _batch_norm_bwd(how: How, kept: Any, cotangents: Any) -> tuple[jax.Array, ...]:
    x, *vectors = kept
    dx, dscale, dbias = _call(_backward, how, _shapes(x), x, cotangents[0], *vectors)
    return dx, dscale[0], dbias[0]


batch_norm.defvjp(_batch_norm_fwd, _batch_norm_bwd)
