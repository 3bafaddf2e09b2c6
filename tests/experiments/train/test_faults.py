"""Tests that `--resume` after a kill, a full disk or a lost folder gives the same bits as an undisturbed run."""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from experiments import jsonl
from experiments.train.cluster.folder import has_begun
from tests.support.programs import assert_same_run, committed, compilation_cache, finish, learning, start, write_images

pytestmark = [pytest.mark.slow, pytest.mark.long]
SHORT = 64  # steps, where a run need not be seen to its end
STARTUP = 6.0  # seconds: the span over which the kills of a starting program are spread
TORN = "*.orbax-checkpoint-tmp*"


class Runs:
    """Starts runs of a tiny network on noise, 20 epochs of 32 steps, which share one compilation cache."""

    def __init__(self, folder: Path):
        self.folder, self.environment = folder, compilation_cache(folder / "compiled")
        self.data = write_images(folder / "images", train=512, test=16)

    def start(self, out: Path, *options: object, under: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        data = ["--data", "fashion-mnist", "--data-dir", self.data, "--batch-size", 16, "--epochs", 20]
        size = ["--width", 2, "--devices", 2, "--save-every", 5]
        return start(*data, *size, "--out", out, *options, under=under, environment=self.environment)

    def finish(self, out: Path, *options: object, status: int = 0, under: tuple[str, ...] = ()) -> str:
        return finish(self.start(out, *options, under=under), status)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def short(runs: Runs) -> Path:
    """Returns the folder of an undisturbed run of the first steps."""
    runs.finish(runs.folder / "short", "--stop-after", SHORT)
    return runs.folder / "short"


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 60) -> None:
    """Waits until the condition holds, and fails if the program ends before that."""
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.001)


def starts(out: Path) -> list[int]:
    """Returns the step at which each start began, of those that wrote their first line."""
    lines = jsonl.read(out / "metrics.jsonl") if has_begun(out) else []
    return [line["step"] for line in lines if line["kind"] in ("config", "resume")]


def torn(out: Path) -> bool:
    """Returns True if a checkpoint has been started and not completed."""
    return any((out / "checkpoints").glob(TORN))


def error(text: str) -> str:
    """Returns the one line that says what went wrong."""
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, text
    return lines[0]


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_killed_at_random_moments_and_inside_checkpoint_writes(runs: Runs, tmp_path: Path) -> None:
    rng, out, whole, hits = random.Random(0), tmp_path / "killed", tmp_path / "whole", 0
    runs.finish(whole)  # undisturbed; from now on nothing is compiled, so that no kill hits JAX's cache
    moments = ["start"] * 3 + ["first step"] * 3 + ["training"] * 6 + ["write"] * 9
    rng.shuffle(moments)
    for moment in moments:
        before, last = len(starts(out)), max(committed(out), default=0)
        process = runs.start(out, "--resume")
        if moment == "start":
            time.sleep(rng.uniform(0, STARTUP))
        else:
            wait_until(lambda before=before: len(starts(out)) > before, process)  # has removed incomplete checkpoints
            assert starts(out)[-1] == last, "went on from another checkpoint than the last whole one"
            if moment == "first step":
                time.sleep(rng.uniform(0, 1))
            else:
                goal = last + rng.randrange(1, 15)  # in steps, because the time of a step varies on a busy machine
                wait_until(lambda goal=goal: max(committed(out), default=0) >= goal, process)
            if moment == "training":
                time.sleep(rng.uniform(0, 0.2))
            if moment == "write":
                wait_until(partial(torn, out), process)
                time.sleep(rng.uniform(0, 0.01))
        kill(process)
        hits += moment != "start" and torn(out)
    assert hits >= 6, "too few of the kills hit the write of a checkpoint"
    assert len(set(starts(out))) >= 12, "too few of the starts went on from a checkpoint of their own"
    assert committed(out)[-1] < committed(whole)[-1], "the run was over before the last kill"
    runs.finish(out, "--resume")
    assert_same_run(whole, out)


def test_sigterm_saves_and_resume_goes_on(runs: Runs, short: Path, tmp_path: Path) -> None:
    process = runs.start(tmp_path / "out")
    wait_until(lambda: committed(tmp_path / "out"), process)
    process.send_signal(signal.SIGTERM)
    assert "--resume goes on" in finish(process)
    assert committed(tmp_path / "out")[-1] == learning(tmp_path / "out")[-1]["step"] < SHORT
    assert f"stopped after {SHORT}" in runs.finish(tmp_path / "out", "--resume", "--stop-after", SHORT)
    assert_same_run(short, tmp_path / "out")


# Programs that restrict themselves and then run a command; unlike file permissions, the limit also stops root.
LIMITED = (
    "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2); "
    "os.execv(sys.argv[2], sys.argv[2:])"
)
UNPRIVILEGED = (  # PR_CAPBSET_DROP (24) of CAP_DAC_OVERRIDE (1); only root has and needs it
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(24, 1, 0, 0, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


def limited(kilobytes: int) -> tuple[str, ...]:
    """Returns a command that limits the size of files, as if the disk were full for longer ones."""
    return sys.executable, "-c", LIMITED, str(1024 * kilobytes)


@pytest.mark.parametrize(("kilobytes", "message"), [(10, "a checkpoint cannot be written to"), (20, "File too large")])
def test_a_full_disk_is_named_and_spares_the_last_checkpoint(
    runs: Runs, short: Path, tmp_path: Path, kilobytes: int, message: str
) -> None:
    runs.finish(tmp_path / "out", "--stop-after", 7)
    before = (tmp_path / "out" / "metrics.jsonl").read_text()
    line = error(runs.finish(tmp_path / "out", "--resume", under=limited(kilobytes), status=1))
    assert message in line and "--resume goes on from the last" in line
    assert 7 <= committed(tmp_path / "out")[-1] < SHORT
    assert (tmp_path / "out" / "metrics.jsonl").read_text().startswith(before)
    runs.finish(tmp_path / "out", "--resume", "--stop-after", SHORT)
    assert_same_run(short, tmp_path / "out")


@pytest.mark.parametrize("part", [".", "checkpoints"])
def test_a_folder_that_becomes_read_only(runs: Runs, short: Path, tmp_path: Path, part: str) -> None:
    out = tmp_path / "out"
    runs.finish(out, "--stop-after", 7)
    (out / part).chmod(0o555)
    text = runs.finish(out, "--resume", under=(sys.executable, "-c", UNPRIVILEGED), status=1)
    (out / part).chmod(0o755)
    line = error(text)
    assert "cannot be written" in line and "Permission denied" in line
    assert committed(out) == [5, 7]
    runs.finish(out, "--resume", "--stop-after", SHORT)
    assert_same_run(short, out)


def test_a_folder_that_vanishes_and_comes_back(runs: Runs, short: Path, tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    process = runs.start(out)
    wait_until(lambda: committed(out), process)
    out.rename(elsewhere)
    line = error(finish(process, status=1))
    assert "--resume goes on from the last" in line
    if out.exists():  # Orbax may have been about to write, and makes a folder for it
        assert not has_begun(out)
        out.rename(tmp_path / "remains")
    elsewhere.rename(out)
    runs.finish(out, "--resume", "--stop-after", SHORT)
    assert_same_run(short, out)


def test_a_place_where_nothing_can_be_written(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "Not a directory" in runs.finish(tmp_path / "file", status=1)
