"""What compilers make of `activation=` and `residual=`: bytes and temporary memory, separate operations or fused.

Claim:    Compiled as a whole, act(BN(x) + residual) costs the same bytes and memory either way, on CPU, TPU and GPU;
          the argument saves memory where the backward pass is not compiled together with the forward pass.
Command:  python -m experiments.bench.fusion            # needs libtpu and XLA:GPU: pip install "jax[tpu]"
          "jax-cuda13-plugin==$JAX" "jax-cuda13-pjrt==$JAX", with $JAX the version of jax; --targets cpu needs neither
Hardware: 2 CPU cores; for TPU v5e and H100 the programs are compiled, not run, and the figures are the compilers'
Time:     2 min
"""

import argparse
import os
import re
from collections.abc import Callable
from typing import Any

# Before libtpu loads: there is no TPU or GPU here, and another process may hold the library.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import bnjax

H100 = """
gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
 shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000
 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
 cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
SHAPES = {"cpu": (16, 28, 28, 64), "v5e": (512, 32, 32, 128), "h100": (512, 32, 32, 128)}


def device_of(target: str) -> Any:
    """A device to compile for."""
    if target == "cpu":
        return jax.devices("cpu")[0]
    if target == "v5e":
        return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    described = dict(platform="cuda", topology_name="", target_config=H100, topology="1x1x1")
    return topologies.get_topology_desc(**described).devices[0]


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


_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "copy-done"}


def _size(types: str) -> int:
    total = 0
    for dtype, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", types):
        size = _SIZES.get(dtype, 0)
        for d in filter(None, dims.split(",")):
            size *= int(d)
        total += size
    return total


def traffic(hlo: str) -> int:
    """Bytes that the main program's operations read and write, for XLA:GPU, which counts none itself."""
    types: dict[str, str] = {}
    total = 0
    for line in hlo[re.search(r"^ENTRY", hlo, re.M).start() :].splitlines()[1:]:  # type: ignore[union-attr]
        found = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)", line)
        if found is None:
            continue
        name, kind, operation, rest = found.groups()
        types[name] = kind
        if operation not in _FREE:
            operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
            total += _size(kind) + sum(_size(types.get(o, "")) for o in operands)
    return total


def measure(target: str, dtype: Any, fused: bool, activation: Activation, blocks: int) -> str:
    device, shape = device_of(target), SHAPES[target]
    place = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))  # noqa: E731
    channels = shape[-1]
    vectors = {name: place((channels,), jnp.float32) for name in ("scale", "bias", "pivot")}
    params = [dict(kernel=place((3, 3, channels, channels), dtype), **vectors)] * blocks
    x = place(shape, dtype)
    compiled = gradient(fused, activation, blocks).lower(params, x).compile()
    size = x.size * jnp.dtype(dtype).itemsize
    count = traffic(compiled.as_text()) if target == "h100" else compiled.cost_analysis()["bytes accessed"]
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
                    print(f"{name} {target:5s} {jnp.dtype(dtype).name:9s} {found}", flush=True)


if __name__ == "__main__":
    main()
