"""Tests `python -m experiments.train` as users run it: a smoke run, stop and resume to the last bit, errors, files."""

import json
import re
import signal
import time
from pathlib import Path

import jax
import pytest
from tensorboardX.proto.event_pb2 import Event

from experiments import jsonl
from experiments.errors import ConfigError
from experiments.train.__main__ import main
from experiments.train.cluster.folder import held, run_folder, sees
from tests.support.programs import assert_same_run, checkpoint, finish, learning, start

STEPS = 62  # in the one epoch of --smoke: 4,000 images in batches of 64


def smoke(out: Path, *options: object, status: int = 0) -> str:
    return finish(start("--smoke", "--out", out, *options), status)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns an uninterrupted smoke run on eight devices."""
    out = tmp_path_factory.mktemp("run") / "whole"
    (out.parent / "stdout").write_text(smoke(out, "--devices", 8))
    return out


def test_last_line_says_accuracy_time_and_place(whole: Path) -> None:
    last = (whole.parent / "stdout").read_text().splitlines()[-1]
    assert re.match(rf"test accuracy \d+\.\d+% after {STEPS} steps in \d+\.\d s; files in {whole}: metrics.jsonl", last)


def test_metrics_lines_are_complete(whole: Path) -> None:
    lines = jsonl.read(whole / "metrics.jsonl")
    assert lines[0]["kind"] == "config"
    assert lines[0]["hardware"]["devices"] == 8
    assert lines[0]["versions"]["jax"] == jax.__version__
    assert lines[0]["config"]["training"]["batch_size"] == 64
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [STEPS]
    assert {"mean", "var"} == lines[1]["drift"]["BatchNorm_0"].keys()
    assert lines[-1]["accuracy"] > 0.5


def test_curves_are_a_picture(whole: Path) -> None:
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_curves_are_drawn_from_the_lines_alone(whole: Path, tmp_path: Path) -> None:
    finish(start(whole / "metrics.jsonl", tmp_path / "again.png", module="experiments.train.plots"))
    assert (tmp_path / "again.png").read_bytes() == (whole / "curves.png").read_bytes()


def test_tensorboard_events_are_readable(whole: Path) -> None:
    (path,) = (whole / "tensorboard").iterdir()
    scalars = [(event.step, value) for event in events(path.read_bytes()) for value in event.summary.value]
    losses = {step: value.simple_value for step, value in scalars if value.tag == "train/loss"}
    expected = {line["step"]: line["loss"] for line in learning(whole) if line["kind"] == "train"}
    assert losses == pytest.approx(expected, rel=1e-5)


def events(content: bytes) -> list[Event]:
    """Reads the events of a TFRecord file, whose records are a length, its checksum, an event, and its checksum."""
    found = []
    while content:
        length = int.from_bytes(content[:8], "little")
        found.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return found


@pytest.mark.slow
def test_stop_and_resume_is_the_uninterrupted_run(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "halves"
    assert "stopped after 25 of 62 steps" in smoke(out, "--devices", 8, "--stop-after", 25)
    with (out / "metrics.jsonl").open("a") as file:  # a crash after the checkpoint: lines beyond it, the last cut short
        file.write(json.dumps({"kind": "train", "step": 26, "loss": 0.0}) + '\n{"kind": "tra')
    assert "test accuracy" in smoke(out, "--devices", 8, "--resume")
    assert_same_run(whole, out)


@pytest.fixture(scope="module")
def signalled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Returns folder and output of a run on one device under plain jit, which SIGTERM ended in its first steps."""
    out = tmp_path_factory.mktemp("run") / "signalled"
    process = start("--smoke", "--out", out, "--devices", 1, "--partition", "jit")
    while not (out / "metrics.jsonl").is_file() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    return out, finish(process)


@pytest.mark.slow
def test_sigterm_saves_and_ends_cleanly(signalled: tuple[Path, str]) -> None:
    out, text = signalled
    stopped = re.search(rf"stopped after (\d+) of {STEPS} steps .* --resume goes on", text)
    assert stopped
    assert len(learning(out)) == int(stopped[1])
    assert checkpoint(out, int(stopped[1]))


def test_one_device_under_jit_gives_the_numbers_of_eight_under_shard_map(
    whole: Path, signalled: tuple[Path, str]
) -> None:
    for one, eight in zip(learning(signalled[0])[:5], learning(whole), strict=False):
        assert one["loss"] == pytest.approx(eight["loss"], rel=1e-3)


def test_runs_are_numbered_and_resume_takes_the_latest(tmp_path: Path) -> None:
    for name in ("0001", "0002"):
        folder, goes_on = run_folder(tmp_path, out=None, resume=False)
        assert folder == tmp_path / name and not goes_on
        (folder / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "0003").mkdir()  # the files of a start that failed
    assert run_folder(tmp_path, out=None, resume=True) == (tmp_path / "0002", True)
    assert run_folder(tmp_path, out=tmp_path / "0001", resume=True) == (tmp_path / "0001", True)


@pytest.mark.parametrize("left", [[], ["checkpoints"], ["checkpoints", "metrics.jsonl"]], ids=len)
def test_resume_begins_where_a_start_was_killed_at_once(tmp_path: Path, left: list[str]) -> None:
    out = tmp_path / "killed"
    for name in left:
        out.mkdir(exist_ok=True)
        (out / name).write_text('{"kind": "con')
    assert run_folder(tmp_path, out, resume=True) == (out, False)
    assert run_folder(tmp_path, out=None, resume=True) == (tmp_path / "0001", False)


def test_a_folder_with_checkpoints_and_no_metrics_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"is not empty: it holds no metrics\.jsonl"):
        run_folder(tmp_path, tmp_path, resume=True)


ERRORS = {
    "is not empty: add --resume": [],
    "begun with other options (lr 0.003 → 0.1)": ["--resume", "--lr", "0.1"],
    "apt install dataset-fashion-mnist": ["--data", "fashion-mnist", "--data-dir", "nowhere"],
    "--batch-size 63 does not divide over 8 devices": ["--batch-size", "63"],
    "--epochs 0: expected a positive number": ["--epochs", "0"],
}


@pytest.mark.slow
@pytest.mark.parametrize("message", ERRORS)
def test_errors_are_one_line(whole: Path, capsys: pytest.CaptureFixture[str], message: str) -> None:
    assert main(["--smoke", "--out", str(whole), *ERRORS[message]]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.slow
def test_an_error_ends_the_process_with_status_2(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").touch()
    text = finish(start("--out", tmp_path, "--resume"), status=2)
    assert f"error: {tmp_path} is not empty: it holds no metrics.jsonl" in text


def test_unknown_data_is_refused_by_name() -> None:
    assert "fashion-mnist" in finish(start("--data", "cifar"), status=2)


def test_help_explains_every_option() -> None:
    text = finish(start("--help"))
    for option in ("--data", "--epochs", "--partition", "--devices", "--resume", "--smoke"):
        assert option in text
    assert "Weight of the old value in BN's running averages" in " ".join(text.replace("│", " ").split())


def test_the_package_lists_its_experiments() -> None:
    assert re.search(r"(?m)^experiments\.train\n +A three-block BN network", finish(start(module="experiments")))


def test_a_folder_is_held_by_one_run_alone(tmp_path: Path) -> None:
    with held(tmp_path, token=7):
        assert sees(tmp_path, 7) and not sees(tmp_path, 8)
        with (
            pytest.raises(ConfigError, match=r"is being written by another run \(.+ pid"),
            held(tmp_path, token=8),
        ):
            pass
    with held(tmp_path, token=9):
        assert sees(tmp_path, 9)
