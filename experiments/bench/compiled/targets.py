"""Describes TPUs and GPUs to their compilers, so that programs can be compiled on a machine without such devices.

The compilers, libtpu and XLA:GPU, are installed by `pip install "bnjax[aot]"`.
"""

import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.experimental import topologies

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
NODE = 8  # GPUs of a host, where there are more
TARGETS = ("cpu", "v5e:2x2", "v5e:16x16", "v6e:2x2", "h100", "4xh100")


def devices_of(target: str) -> Sequence[Any]:
    """Returns all devices of a target.

    From then on this process computes on the CPU, and only compiles for other devices.
    """
    jax.config.update("jax_platforms", "cpu")
    if target == "cpu":
        return jax.devices("cpu")
    if target.startswith("v"):
        _tell_libtpu()
        return topologies.get_topology_desc(platform="tpu", topology_name=target).devices
    count = int(target.split("x")[0]) if target[0].isdigit() else 1
    hosts = max(1, count // NODE)
    described = dict(platform="cuda", topology_name="", target_config=H100, topology=f"1x{hosts}x{count // hosts}")
    return topologies.get_topology_desc(**described).devices


def _tell_libtpu() -> None:
    """Sets the environment that libtpu reads when it loads: no TPU is attached, and other processes may load it too."""
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def require(targets: Iterable[str]) -> None:
    """Exits with status 2 if a target's compiler is not installed, and prints what to install."""
    if reasons := [reason for target in targets if (reason := missing(target))]:
        print(*reasons, sep="\n", file=sys.stderr)
        raise SystemExit(2)


def missing(target: str) -> str:
    """Returns why a target cannot be compiled for here, or an empty string if it can."""
    try:
        devices_of(target)
    except (RuntimeError, ValueError, jax.errors.JaxRuntimeError) as error:
        return f'{target}: its compiler is not installed, pip install "bnjax[aot]" ({str(error).splitlines()[0]})'
    return ""
