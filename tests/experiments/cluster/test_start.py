"""Tests that real processes train together by what Slurm or Open MPI sets, and that a wrong start ends all in words."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.experiments.cluster.launchers import LAUNCHERS
from tests.support.processes import free_port
from tests.support.programs import compilation_cache, finish, learning, start, write_images

STEPS = 4


class Job:
    """Starts the processes of a tiny run on noise as a launcher does: one command, an environment for each."""

    def __init__(self, folder: Path):
        self.environment = compilation_cache(folder / "compiled")
        images = write_images(folder / "images", train=64, test=16)
        self.options = ["--data", "fashion-mnist", "--data-dir", images, "--batch-size", 16, "--epochs", 1]
        self.options += ["--width", 2, "--devices", 1]

    def start(self, launcher: str, *options: object, own: tuple[object, ...] = ()) -> list[subprocess.Popen[str]]:
        """Starts two processes; `own` are options of the second one alone."""
        port, make = free_port(), LAUNCHERS[launcher]
        return [
            start(
                *self.options,
                *options,
                *(own if process else ()),
                environment={**self.environment, **make(process=process, processes=2, port=port)},
            )
            for process in (0, 1)
        ]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("job"))


def test_another_option_in_one_process_ends_both_in_words(job: Job, tmp_path: Path) -> None:
    processes = job.start("slurm", "--out", tmp_path / "out", own=("--seed", 1, "--width", 4))
    for process in processes:
        text = finish(process, status=2)
        assert "error: --width is 4 in process 1 and 2 in process 0; --seed is 1 in process 1 and 0 in pro" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_processes_of_a_launcher_train_together(job: Job, tmp_path: Path, launcher: str) -> None:
    outputs = [finish(process) for process in job.start(launcher, "--out", tmp_path / "out")]
    assert f"after {STEPS} steps" in outputs[0] and "process 1 is done" in outputs[1]
    assert len({re.search(r"state ([0-9a-f]{12})$", text.strip())[1] for text in outputs}) == 1
    assert len([line for line in learning(tmp_path / "out") if line["kind"] == "train"]) == STEPS


WRONG = {
    "apt install dataset-fashion-mnist": "nowhere",
    "number of training images is 48 in process 1 and 64 in process 0": "fewer",
}


@pytest.mark.slow
@pytest.mark.parametrize("message", WRONG)
def test_a_host_whose_data_are_not_those_of_the_others(job: Job, tmp_path: Path, message: str) -> None:
    write_images(tmp_path / "fewer", train=48, test=16)
    for process in job.start("slurm", "--out", tmp_path / "out", own=("--data-dir", tmp_path / WRONG[message])):
        assert message in finish(process, status=2)


@pytest.mark.slow
def test_a_folder_on_no_shared_disk(job: Job, tmp_path: Path) -> None:
    """Starts the processes in different folders, with the same relative --out."""
    options = ["--runs", "runs", "--join-timeout", 15]
    port = free_port()
    processes = []
    for process in (0, 1):
        (tmp_path / str(process)).mkdir()
        environment = {**job.environment, **LAUNCHERS["slurm"](process=process, processes=2, port=port)}
        under = ("env", "-C", str(tmp_path / str(process)), "PYTHONPATH=" + str(Path.cwd()))
        processes.append(start(*job.options, *options, environment=environment, under=under))
    for process in processes:
        text = finish(process, status=2)
        assert "process 1 does not see the files of process 0 in runs/0001: it must be on a disk that all" in text


@pytest.mark.slow
def test_a_folder_that_process_0_refuses_ends_both(job: Job, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").touch()
    first, second = job.start("slurm", "--out", tmp_path)
    assert "is not empty: add --resume" in finish(first, status=2)
    assert "process 0 could not take the folder" in finish(second, status=2)


@pytest.mark.slow
def test_two_runs_do_not_write_one_folder(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    long = ("--epochs", 2000, "--out", out)
    first = start(*job.options, *long, environment=job.environment)
    while not (out / "metrics.jsonl").is_file():
        assert first.poll() is None, first.communicate()
    text = finish(start(*job.options, *long, "--resume", environment=job.environment), status=2)
    assert f"{out} is being written by another run (" in text and f"pid {first.pid})" in text
    first.kill()
    first.communicate()
    finish(start(*job.options, *long, "--resume", "--stop-after", 8, environment=job.environment))
