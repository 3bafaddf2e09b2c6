"""Tests the reproductions: each runs in small, continues where it stopped, and draws from its lines alone."""

import importlib
import json

import numpy as np
import optax
import pytest

from experiments import jsonl
from experiments.data.images import Labelled, Splits
from experiments.models.convolutional import ConvNet, Unnormalised
from experiments.repro import study as repro
from tests.support.programs import ROOT, finish, start

STUDIES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in ROOT.glob("experiments/**/*.py")
    if "\nSTUDY = " in path.read_text()
)


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_smoke(name, tmp_path):
    """Checks that a reproduction writes a picture and a table, and that a second run draws them from the
    lines alone.
    """
    out = finish(start("--smoke", "--out", tmp_path, module=name))
    study = importlib.import_module(name).STUDY
    file = tmp_path / "smoke" / f"{study.name}.jsonl"
    lines = jsonl.read(file)
    assert {line["setting"] for line in lines} == set(study.settings)
    page = repro.report(study, lines)
    assert page in out and file.with_suffix(".md").read_text().strip() == page
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_resnet20(tmp_path):
    """Checks that the reproduction takes the options of `experiments.train`, such as micro-batches and
    mixed precision.
    """
    options = ("--smoke", "--accumulate", 2, "--precision", "bfloat16", "--stop-after", 4, "--out", tmp_path)
    assert "stopped after 4 of 31 steps" in finish(start(*options, module="experiments.repro.he2016"))
    config = jsonl.read(tmp_path / "metrics.jsonl")[0]["config"]["training"]
    assert (config["model"], config["width"], config["accumulate"]) == ("resnet20", 4, 2)


def test_a_study_goes_on_with_the_trials_that_are_missing(tmp_path, monkeypatch, capsys):
    ran = []

    def trial(setting, seed, config):
        ran.append((setting, seed))
        yield {"kind": "step", "step": 1, "accuracy": 0.5}

    study = repro.Study("study", ("a", "b"), trial, lambda lines: f"{len(lines)} lines", lambda lines, figure: None)
    monkeypatch.setattr("sys.argv", ["study", "--seeds", "10", "12", "--out", str(tmp_path)])
    monkeypatch.setattr(repro, "start", lambda hardware: None)  # this process has a fixed number of devices
    repro.run(study, None)
    file = tmp_path / "study.jsonl"
    whole = file.read_text()
    file.write_text("".join(whole.splitlines(keepends=True)[:-2]) + json.dumps({"kind": "step"})[:5])
    ran.clear()
    repro.run(study, None)
    assert ran == [("b", 12)] and len(jsonl.read(file)) == 8
    assert capsys.readouterr().out.count("8 lines") == 2


def test_a_training_outlasts_epochs_that_leave_records_out():
    rng = np.random.default_rng(0)
    few = Labelled(rng.integers(0, 256, (20, 28, 28, 1), np.uint8), rng.integers(0, 10, 20, np.int32))
    options = dict(steps=3, every=2, batch_size=16, seed=0)  # one batch in each epoch
    lines = [line for _, line in repro.train(ConvNet(Unnormalised, (1,)), optax.sgd(0.1), Splits(few, few), **options)]
    assert [line["step"] for line in lines] == [2, 3]
