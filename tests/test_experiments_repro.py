"""The reproductions: each runs in small, goes on where it stopped, and draws and tabulates from its lines alone."""

import importlib
import json
from pathlib import Path

import pytest

from experiments import repro
from programs import finish, start

STUDIES = sorted(path.stem for path in (Path(__file__).parents[1] / "experiments").glob("repro_*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_smoke(name, tmp_path):
    """As a program, into a picture and a table; and a second time from its lines alone."""
    out = finish(start("--smoke", "--out", tmp_path, module=f"experiments.{name}"))
    file = tmp_path / "smoke" / f"{name}.jsonl"
    study = importlib.import_module(f"experiments.{name}").STUDY
    lines = repro.read(file)
    assert {line["setting"] for line in lines} == set(study.settings)
    assert study.table(lines) in out and file.with_suffix(".md").read_text().strip() == study.table(lines)
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_study_goes_on_with_the_trials_that_are_missing(tmp_path, monkeypatch, capsys):
    ran = []

    def trial(setting, seed, config):
        ran.append((setting, seed))
        yield {"kind": "step", "step": 1, "accuracy": 0.5}

    study = repro.Study("study", ("a", "b"), trial, lambda lines: f"{len(lines)} lines", lambda lines, figure: None)
    monkeypatch.setattr("sys.argv", ["study", "--seeds", "2", "--out", str(tmp_path)])
    repro.run(study, None)
    file = tmp_path / "study.jsonl"
    whole = file.read_text()
    file.write_text("".join(whole.splitlines(keepends=True)[:-2]) + json.dumps({"kind": "step"})[:5])
    ran.clear()
    repro.run(study, None)
    assert ran == [("b", 1)] and len(repro.read(file)) == 8
    assert capsys.readouterr().out.count("8 lines") == 2
