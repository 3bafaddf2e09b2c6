"""What compilers make of `activation=` and `residual=`: bytes and temporary memory, separate operations or fused.

Claim:    Compiled as a whole, act(BN(x) + residual) costs the same bytes and memory either way, on CPU, TPU and GPU;
          the argument saves memory where the backward pass is not compiled together with the forward pass.
Command:  python -m experiments.bench.compiled.fusion   # pip install "bnjax[aot]"; --targets cpu needs no compilers
Hardware: 2 CPU cores; for TPU v5e and H100 the programs are compiled, not run, and the figures are the compilers'
Time:     2 min
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

import bnjax
from experiments.bench.compiled import hlo
from experiments.bench.compiled.targets import devices_of

SHAPES = {"cpu": (16, 28, 28, 64), "v5e:2x2": (512, 32, 32, 128), "h100": (512, 32, 32, 128)}


Activation = Callable[[jax.Array], jax.Array]


def block(fused: bool, activation: Activation, x: jax.Array, p: dict[str, jax.Array]) -> jax.Array:
    """act(BN(conv(x)) + x)."""
    y = jax.lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    options: dict[str, Any] = dict(pivot=p["pivot"], dtype=x.dtype)
    if fused:
        return bnjax.batch_norm(y, p["scale"], p["bias"], activation=activation, residual=x, **options)[0]
    return activation(bnjax.batch_norm(y, p["scale"], p["bias"], **options)[0] + x)


def gradient(fused: bool, activation: Activation, blocks: int) -> Callable[..., Any]:
    """Of several blocks in all parameters and x."""

    def loss(params: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
        for p in params:
            x = block(fused, activation, x, p)
        return jnp.sum(jnp.square(x.astype(jnp.float32)))

    return jax.jit(jax.grad(loss, (0, 1)))


def measure(target: str, dtype: Any, fused: bool, activation: Activation, blocks: int) -> str:
    device, shape = devices_of(target)[0], SHAPES[target]
    place = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))  # noqa: E731
    channels = shape[-1]
    vectors = {name: place((channels,), jnp.float32) for name in ("scale", "bias", "pivot")}
    params = [dict(kernel=place((3, 3, channels, channels), dtype), **vectors)] * blocks
    x = place(shape, dtype)
    compiled = gradient(fused, activation, blocks).lower(params, x).compile()
    size = x.size * jnp.dtype(dtype).itemsize
    count = compiled.cost_analysis()["bytes accessed"] if target == "cpu" else hlo.traffic(compiled.as_text())[0]
    memory = compiled.memory_analysis().temp_size_in_bytes
    return f"bytes {count / size:6.1f}   temporary memory {memory / size:5.2f}"


def kept(fused: bool, activation: Activation) -> str:
    """Of one block outside jit: what `jax.vjp` holds until the backward pass, each buffer once."""
    shape = (8, 16, 16, 32)
    x, v = jnp.ones(shape, jnp.bfloat16), jnp.ones(shape[-1])
    p = dict(kernel=jnp.ones((3, 3, 32, 32), x.dtype), scale=v, bias=v, pivot=0.1 * v)
    _, pullback = jax.vjp(lambda x, p: block(fused, activation, x, p), x, p)
    leaves = [leaf for leaf in jax.tree.leaves(pullback) if leaf.size >= x.size]
    return f"{sum({leaf.unsafe_buffer_pointer(): leaf.nbytes for leaf in leaves}.values()) / x.nbytes:.1f} activations"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--blocks", type=int, default=2)
    args = parser.parse_args()
    print(f"gradient of {args.blocks} blocks act(BN(conv(x)) + x), in sizes of the activation")
    for activation in (jax.nn.relu, jax.nn.silu):
        for fused in (False, True):
            name = f"{activation.__name__:5s} {'fused' if fused else 'separate':9s}"
            print(f"{name} kept by jax.vjp outside jit, bfloat16, one block: {kept(fused, activation)}")
            for target in args.targets:
                for dtype in (jnp.float32, jnp.bfloat16):
                    found = measure(target, dtype, fused, activation, args.blocks)
                    print(f"{name} {target:7s} {jnp.dtype(dtype).name:9s} {found}", flush=True)


if __name__ == "__main__":
    main()
