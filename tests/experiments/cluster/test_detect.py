"""Tests that a process finds its place by options or by its launcher, and that a start that cannot work is refused."""

import pytest

from experiments.errors import ConfigError
from experiments.train.cluster.detect import Member, member
from experiments.train.config import Hardware
from tests.experiments.cluster.launchers import LAUNCHERS, VARIABLES

ADDRESS = "localhost:4321"
BY_HAND = Hardware(coordinator=ADDRESS, processes=3, process_id=2)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_without_launcher_and_options_a_process_is_alone() -> None:
    assert member(Hardware()) is None


def test_by_options() -> None:
    assert member(BY_HAND) == Member(ADDRESS, 3, 2)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_by_launcher(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LAUNCHERS[launcher](process=1, processes=2, port=4321).items():
        monkeypatch.setenv(name, value)
    found = member(Hardware())
    assert found is not None and found.coordinator.rpartition(":")[::2] in {
        ("localhost", "4321"),
        ("127.0.0.1", "4321"),
    }
    assert found[1:] == (2, 1, [1])  # its GPU is that of its number on the host
    assert member(Hardware(cluster="off")) is None
    assert member(Hardware(coordinator="localhost:7")) == Member("localhost:7", 2, 1, [1])


def test_one_process_of_a_launcher_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LAUNCHERS["slurm"](process=0, processes=1, port=4321).items():
        monkeypatch.setenv(name, value)
    assert member(Hardware()) is None


WRONG = {
    "--processes and --process-id need --coordinator": ({}, Hardware(processes=2)),
    "--process-id need --coordinator": ({}, Hardware(process_id=1)),
    "add --processes P --process-id I": ({}, Hardware(coordinator=ADDRESS)),
    "--process-id 2: expected 0 to 1": ({}, Hardware(coordinator=ADDRESS, processes=2, process_id=2)),
    "expected HOST:PORT": ({}, Hardware(coordinator="", processes=2, process_id=0)),
    "write srun in front of the command": ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, Hardware()),
    "write --cluster mpi4py": ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, Hardware()),
    "PMI_SIZE=2: several processes were started": ({"PMI_SIZE": "2", "PMI_RANK": "0"}, Hardware()),
    "this is a job of Kubernetes": ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, Hardware()),
    "JAX recognises a cluster, but not its processes": (
        LAUNCHERS["slurm"](process=0, processes=2, port=4321) | {"SLURM_NTASKS": "two"},
        Hardware(),
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_start_that_cannot_be_one_says_why(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment, hardware = WRONG[message]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        member(hardware)


@pytest.mark.parametrize("environment", [{"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, {"PMI_SIZE": "2"}], ids=str)
def test_alone_on_purpose(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert member(Hardware(cluster="off")) is None
    assert member(Hardware(cluster="off", coordinator=ADDRESS, processes=2, process_id=1)) == Member(ADDRESS, 2, 1)
