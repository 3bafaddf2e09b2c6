"""Devices to compile for that are not there: TPUs and GPUs by their real compilers, on a machine that has neither.

Import this before JAX makes its first device. The compilers come with `pip install "bnjax[aot]"`: libtpu and XLA:GPU.
"""

import os
from collections.abc import Sequence
from typing import Any

# Before libtpu loads: there is no TPU or GPU here, and another process may hold the library.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import jax
from jax.experimental import topologies

jax.config.update("jax_platforms", "cpu")  # where JAX was imported before this file

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
TARGETS = ("cpu", "v5e:2x2", "v5e:16x16", "v6e:2x2", "h100", "4xh100")


def devices_of(target: str) -> Sequence[Any]:
    """All devices of a target."""
    if target == "cpu":
        return jax.devices("cpu")
    if target.startswith("v"):
        return topologies.get_topology_desc(platform="tpu", topology_name=target).devices
    count = int(target.split("x")[0]) if target[0].isdigit() else 1
    described = dict(platform="cuda", topology_name="", target_config=H100, topology=f"1x1x{count}")
    return topologies.get_topology_desc(**described).devices


def missing(target: str) -> str:
    """Why a target cannot be compiled for here; empty if it can."""
    try:
        devices_of(target)
    except (RuntimeError, ValueError, jax.errors.JaxRuntimeError) as error:
        return f'{target}: its compiler is not installed, pip install "bnjax[aot]" ({str(error).splitlines()[0]})'
    return ""
