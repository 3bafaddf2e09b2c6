"""Says which process of a run this one is: by --coordinator, or by what the launcher left in the environment.

JAX itself recognises Slurm, Open MPI, TPU pods and Kubernetes (`jax.distributed.initialize` without arguments). Its
detection is called here, and not inside `initialize`, so that the processes can meet before JAX connects them.
"""

import os
import warnings
from collections.abc import Sequence
from typing import NamedTuple

from jax._src.clusters import ClusterEnv

from experiments.errors import ConfigError
from experiments.train.config import Hardware, address

ALONE = "or write --cluster off to train alone in this process"
SEVERAL = {  # variables that say how many processes a launcher started; what to write where JAX does not recognise it
    "OMPI_COMM_WORLD_SIZE": "Open MPI 5 no longer sets OMPI_MCA_orte_hnp_uri, by which JAX knows it: "
    "write --cluster mpi4py (pip install mpi4py)",
    "PMI_SIZE": "JAX does not know this MPI by itself: write --cluster mpi4py (pip install mpi4py)",
    "SLURM_NTASKS": "JAX knows Slurm by SLURM_STEP_NODELIST, which srun sets: write srun in front of the command",
}


class Member(NamedTuple):
    """A process among those that train together."""

    coordinator: str  # host:port of process 0
    processes: int
    process_id: int
    local_devices: Sequence[int] | None = None  # the GPUs of this host that it uses; None: all of them


def member(hardware: Hardware) -> Member | None:
    """Returns which process this one is, or None if it trains alone.

    Args:
        hardware: --coordinator, --processes and --process-id, each of which a launcher may also give, and --cluster.

    Raises:
        ConfigError: the options contradict each other, or several processes were started and JAX cannot connect them.
    """
    if hardware.coordinator is not None:
        address(hardware.coordinator)
    given = hardware.coordinator, hardware.processes, hardware.process_id
    found = Member(*(given if hardware.cluster == "off" else detected(hardware)))
    if found.coordinator is None:
        if hardware.cluster != "off":
            check_alone()
        if (hardware.processes or 1) > 1 or hardware.process_id:
            raise ConfigError("--processes and --process-id need --coordinator HOST:PORT, the address of process 0")
        return None
    if found.processes is None or found.process_id is None:
        raise ConfigError(
            f"--coordinator {found.coordinator}: no launcher says how many processes there are and which of them this "
            "is; add --processes P --process-id I"
        )
    if not 0 <= found.process_id < found.processes:
        raise ConfigError(
            f"--process-id {found.process_id}: expected 0 to {found.processes - 1}, one less than --processes"
        )
    return found if found.processes > 1 else None


def detected(hardware: Hardware) -> tuple[str | None, int | None, int | None, Sequence[int] | None]:
    """Returns coordinator, number of processes, number of this one and its GPUs, as far as JAX can find them.

    Raises:
        ConfigError: JAX recognises the launcher, but not its processes.
    """
    method = None if hardware.cluster == "auto" else hardware.cluster
    coordinator = hardware.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    devices = os.environ.get("JAX_LOCAL_DEVICE_IDS")  # both variables are those of jax.distributed.initialize
    given = (
        coordinator,
        hardware.processes,
        hardware.process_id,
        list(map(int, devices.split(","))) if devices else None,
    )
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = ClusterEnv.auto_detect_unset_distributed_params(*given, method, hardware.join_timeout)
    except Exception as error:
        raise ConfigError(
            f"JAX recognises a cluster, but not its processes ({_line(error)}): mend this, {ALONE}"
        ) from error
    if found[0] is None and method:
        raise ConfigError(f"--cluster {method}: this package is not installed, or not in an MPI: pip install {method}")
    if found[0] is None and said and "JOB_COMPLETION_INDEX" in os.environ:
        raise ConfigError(f"this is a job of Kubernetes ({_line(said[0].message)}): install it, {ALONE}")
    return found


def check_alone() -> None:
    """Raises ConfigError if a launcher started several processes, each of which would now train alone."""
    for name, cure in SEVERAL.items():
        count = os.environ.get(name, "1")
        if count.isdigit() and int(count) > 1:
            raise ConfigError(f"{name}={count}: several processes were started, but {cure}, {ALONE}")


def _line(message: object) -> str:
    """Returns a message as one line."""
    return " ".join(str(message).split())
