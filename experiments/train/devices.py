"""Sets up the devices of a run: simulated CPU devices, several processes, and the mesh over all of them."""

import os
import platform
from importlib.metadata import version
from importlib.util import find_spec

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import multihost

from experiments.errors import ConfigError
from experiments.train.cluster.detect import Member
from experiments.train.config import Hardware

DATA = "data"  # the mesh axis over which a batch is split
GROUPS = "groups"  # the axis before it, where groups of devices normalise apart from each other
WAITS = ("xla_cpu_collective_call_terminate_timeout_seconds", "xla_cpu_collective_timeout_seconds")
PATIENCE = 600  # seconds
PACKAGES = ("jax", "jaxlib", "flax", "optax", "grain", "orbax-checkpoint", "numpy")


def start(hardware: Hardware, member: Member | None = None) -> None:
    """Simulates CPU devices and joins the other processes. Must run before anything asks JAX for its devices.

    Args:
        hardware: --devices and the time limits.
        member: which process this one is; None if it trains alone. The others must be there (`cluster.meet`).
    """
    if hardware.devices and hardware.devices != jax.config.jax_num_cpu_devices:
        jax.config.update("jax_num_cpu_devices", hardware.devices)
    if jax.config.jax_platforms == "cpu" or find_spec("libtpu") is None:  # a TPU's compiler reads the same flags
        be_patient()
    if member:
        jax.distributed.initialize(
            *member,
            cluster_detection_method="deactivate",
            initialization_timeout=hardware.join_timeout,
            heartbeat_timeout_seconds=hardware.heartbeat_timeout,
            shutdown_timeout_seconds=hardware.heartbeat_timeout,
        )


def wait_for_all(seconds: int) -> None:
    """Waits until every process has come here, in JAX's coordination service.

    Before the first collective on CPUs: Gloo, which makes it, ends the program if another process is 30 seconds late.
    """
    multihost.get_barrier_sync_fn()(key="bnjax_first_collective", timeout_ms=1000 * seconds)


def be_patient() -> None:
    """Lets CPU devices wait for each other for ten minutes, and not for 40 seconds, unless XLA_FLAGS says otherwise.

    Simulated devices are threads: on a busy machine one of them may stand still for long, and XLA would end the
    program. XLA reads the flags when it creates the first device.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    missing = [f"--{name}={PATIENCE}" for name in WAITS if name not in flags]
    os.environ["XLA_FLAGS"] = " ".join([flags, *missing]).strip()


def data_mesh(devices: int | None = None, group: int | None = None) -> Mesh:
    """Builds the mesh over which a batch is split.

    Args:
        devices: takes the first ones of each process; by default all of them.
        group: devices in a group; the mesh then has a second axis, that of the groups.
    """
    local = jax.local_device_count()
    if devices and devices > local:
        raise ConfigError(
            f"--devices {devices}: this process has {local} of platform {jax.default_backend()}; "
            "JAX_PLATFORMS=cpu simulates any number"
        )
    counts = [sum(d.process_index == p for d in jax.devices()) for p in range(jax.process_count())]
    other = next((p for p, count in enumerate(counts) if count != counts[0] and not devices), None)
    if other is not None:
        raise ConfigError(
            f"process {other} has {counts[other]} devices and process 0 has {counts[0]}: each reads an equal share of "
            f"a batch, so use machines of one kind, or --devices {min(counts)}"
        )
    each = [[d for d in jax.devices() if d.process_index == p][:devices] for p in range(jax.process_count())]
    # Mesh, not jax.make_mesh: its axes are Auto in every version of JAX
    flat = np.array(each).ravel()
    return Mesh(flat.reshape(-1, group), (GROUPS, DATA)) if group else Mesh(flat, (DATA,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P())


def split(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array whose first axis is split over the devices, those of all axes."""
    return NamedSharding(mesh, P(mesh.axis_names))


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
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that a result depends on."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
