"""Sets up the devices of a run: simulated CPU devices, several processes, and the mesh over all of them."""

import os
import platform
from importlib.metadata import version

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.errors import ConfigError
from experiments.train.config import Hardware

DATA = "data"  # the mesh axis over which a batch is split
PACKAGES = ("jax", "jaxlib", "flax", "optax", "grain", "orbax-checkpoint", "numpy")


def start(hardware: Hardware) -> None:
    """Simulates CPU devices and joins the other processes. Must run before anything asks JAX for its devices."""
    if hardware.devices and hardware.devices != jax.config.jax_num_cpu_devices:
        jax.config.update("jax_num_cpu_devices", hardware.devices)
    if hardware.coordinator:
        jax.distributed.initialize(
            hardware.coordinator,
            hardware.processes,
            hardware.process_id,
            heartbeat_timeout_seconds=hardware.heartbeat_timeout,
            shutdown_timeout_seconds=hardware.heartbeat_timeout,
        )


def data_mesh(devices: int | None = None) -> Mesh:
    """Builds a mesh of one axis over the first `devices` devices of each process, by default over all of them."""
    local = jax.local_device_count()
    if devices and devices > local:
        raise ConfigError(
            f"--devices {devices}: this process has {local} of platform {jax.default_backend()}; "
            "JAX_PLATFORMS=cpu simulates any number"
        )
    each = [[d for d in jax.devices() if d.process_index == p][:devices] for p in range(jax.process_count())]
    # Mesh, not jax.make_mesh: its axes are Auto in every version of JAX
    return Mesh(np.array(each).ravel(), (DATA,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P())


def split(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array whose first axis is split over the devices."""
    return NamedSharding(mesh, P(DATA))


def describe(mesh: Mesh) -> dict[str, dict[str, str | int]]:
    """Returns the hardware and the package versions that a result depends on."""
    device = mesh.devices.flat[0]
    return {
        "hardware": {
            "platform": device.platform,
            "device_kind": device.device_kind,
            "devices": mesh.size,
            "processes": jax.process_count(),
            "cpu_cores": os.cpu_count() or 0,
            "machine": platform.machine(),
        },
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    }
