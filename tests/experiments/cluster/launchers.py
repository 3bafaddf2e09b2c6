"""Makes the environments in which Slurm and Open MPI start the processes of one machine."""

from collections.abc import Callable


def slurm(process: int, processes: int, port: int) -> dict[str, str]:
    """Returns what `srun --ntasks=processes` on one machine sets, and the port of the coordinator."""
    step = {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1", "SLURM_NTASKS": str(processes)}
    return {"SLURM_JOB_ID": "4711", **step, "SLURM_PROCID": str(process), "SLURM_LOCALID": str(process), **at(port)}


def open_mpi(process: int, processes: int, port: int) -> dict[str, str]:
    """Returns what `mpirun -n processes` of Open MPI 4 on one machine sets, and the port of the coordinator."""
    world = {"SIZE": processes, "RANK": process, "LOCAL_RANK": process}
    launcher = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911"}
    return {**launcher, **{f"OMPI_COMM_WORLD_{name}": str(value) for name, value in world.items()}, **at(port)}


def at(port: int) -> dict[str, str]:
    """Returns the variable by which JAX takes another port than the one that follows from the number of the job."""
    return {"JAX_COORDINATOR_PORT": str(port)}


LAUNCHERS: dict[str, Callable[..., dict[str, str]]] = {"slurm": slurm, "open mpi": open_mpi}
VARIABLES = {name for make in LAUNCHERS.values() for name in make(process=0, processes=1, port=1)} | {
    "PMI_SIZE",
    "KUBERNETES_SERVICE_HOST",
    "JOB_COMPLETION_INDEX",
}
