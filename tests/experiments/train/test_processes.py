"""Tests that two processes train as one does, that runs can change processes and devices, and that losing
one ends all.
"""

import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from tests.support.programs import (
    checkpoint,
    committed,
    compilation_cache,
    finish,
    free_address,
    learning,
    start,
    write_images,
)

pytestmark = pytest.mark.slow
STEPS = 16  # two epochs
HEARTBEAT = 10  # seconds


class Cluster:
    """Starts a tiny run on noise in any number of processes."""

    def __init__(self, folder: Path):
        self.environment = compilation_cache(folder / "compiled")
        self.images = write_images(folder / "images", train=128, test=16)

    def start(self, out: Path, *options: object, processes: int, devices: int) -> list[subprocess.Popen[str]]:
        data = ["--data", "fashion-mnist", "--data-dir", self.images, "--batch-size", 16]
        common = [
            *data,
            "--epochs",
            2,
            "--width",
            2,
            "--out",
            out,
            "--devices",
            devices,
            "--heartbeat-timeout",
            HEARTBEAT,
            *options,
        ]
        if processes == 1:
            return [start(*common, environment=self.environment)]
        common += ["--coordinator", free_address(), "--processes", processes]
        return [start(*common, "--process-id", index, environment=self.environment) for index in range(processes)]

    def finish(self, out: Path, *options: object, processes: int, devices: int) -> list[str]:
        """Waits for the processes, and returns what each printed."""
        started = self.start(out, *options, processes=processes, devices=devices)
        return [finish(process) for process in started]


def states(outputs: list[str]) -> set[str]:
    """Returns the fingerprints of the state that the processes printed."""
    return {re.search(r"state ([0-9a-f]{12})$", text.strip())[1] for text in outputs}


def assert_close(one: Path, other: Path) -> None:
    """Asserts that two runs agree to rounding: the metrics of every step, and the final running averages."""
    for mine, yours in zip(learning(one), learning(other), strict=True):
        assert mine["loss"] == pytest.approx(yours["loss"], rel=1e-3)
    first, second = (checkpoint(out, STEPS) for out in (one, other))
    assert first.keys() == second.keys()
    for name in first:
        if "batch_stats" in name:
            np.testing.assert_allclose(first[name], second[name], rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    return Cluster(tmp_path_factory.mktemp("cluster"))


@pytest.fixture(scope="module")
def alone(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the run of one process on one device."""
    out = tmp_path_factory.mktemp("run") / "alone"
    cluster.finish(out, processes=1, devices=1)
    return out


@pytest.fixture(scope="module")
def together(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Returns the run of two processes with two devices each, and what each printed."""
    out = tmp_path_factory.mktemp("run") / "together"
    return out, cluster.finish(out, processes=2, devices=2)


def test_two_processes_give_the_numbers_of_one(alone: Path, together: tuple[Path, list[str]]) -> None:
    assert_close(alone, together[0])


def test_every_process_ends_with_the_same_bits(together: tuple[Path, list[str]]) -> None:
    out, outputs = together
    assert "process 1 is done" in outputs[1]
    assert len(states(outputs)) == 1
    assert len(learning(out)) == STEPS + 2


@pytest.mark.parametrize(("before", "after"), [((2, 2), (1, 1)), ((1, 1), (1, 8)), ((1, 8), (2, 1))], ids=str)
def test_resume_with_other_processes_and_devices(
    cluster: Cluster, alone: Path, tmp_path: Path, before: tuple[int, int], after: tuple[int, int]
) -> None:
    out = tmp_path / "out"
    cluster.finish(out, "--stop-after", 5, processes=before[0], devices=before[1])
    outputs = cluster.finish(out, "--resume", processes=after[0], devices=after[1])
    assert len(states(outputs)) == 1
    assert_close(alone, out)


def wait_for_a_checkpoint(out: Path) -> None:
    until = time.monotonic() + 60
    while not committed(out):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


@pytest.mark.parametrize(("victim", "resumed_by"), [(0, 2), (1, 1)])
def test_the_loss_of_a_process_ends_the_other_and_any_number_goes_on(
    cluster: Cluster, tmp_path: Path, victim: int, resumed_by: int
) -> None:
    out = tmp_path / "out"
    processes = cluster.start(out, "--epochs", 500, processes=2, devices=2)
    wait_for_a_checkpoint(out)
    processes[victim].kill()
    since = time.monotonic()
    _, errors = processes[1 - victim].communicate(timeout=60)
    assert time.monotonic() - since < 3 * HEARTBEAT
    assert processes[1 - victim].returncode not in (0, None)
    assert "error" in errors
    assert processes[victim].communicate() and processes[victim].returncode == -signal.SIGKILL
    last = committed(out)[-1]
    options = ["--epochs", 500, "--resume", "--stop-after", last + 3]
    outputs = cluster.finish(out, *options, processes=resumed_by, devices=2)
    assert f"stopped after {last + 3}" in outputs[0] and len(states(outputs)) == 1


def test_sigterm_to_one_process_stops_all_at_the_same_step(cluster: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "out"
    processes = cluster.start(out, "--epochs", 500, processes=2, devices=1)
    wait_for_a_checkpoint(out)
    processes[1].send_signal(signal.SIGTERM)
    outputs = [finish(process) for process in processes]
    assert "--resume goes on" in outputs[0] and len(states(outputs)) == 1
    assert committed(out)[-1] == learning(out)[-1]["step"]
