"""Tests that the whole training step compiles for a pod, on a small network (`experiments.bench.compiled.pod`)."""

import subprocess
import sys

import pytest

from experiments import jsonl
from tests.support.programs import ROOT

SMALL = """
[training]
data = "photos"
model = "resnet26"
width = 8
image-size = 32
precision = "bfloat16"
optimizer = "sgd"
label-smoothing = 0.1
zero-scale = true
ema = 0.9
"""
NORMS = 1 + 3 * 8 + 4  # of the stem, of eight blocks, and of four shortcuts


@pytest.mark.aot
def test_the_step_on_32_gpus(tmp_path):
    """Checks the all-reduces of 32 GPUs on four hosts, which share statistics, or in groups of 16, or not at all."""
    recipe = tmp_path / "small.toml"
    recipe.write_text(SMALL)
    options = ["--targets", "32xh100", "--per-chip", "4", "--recipe", str(recipe), "--out", str(tmp_path)]
    command = [sys.executable, "-m", "experiments.bench.compiled.pod", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {row["statistics"]: row for row in jsonl.read(tmp_path / "pod.jsonl")[1:]}
    assert rows.keys() == {"all chips", "groups of 16", "each chip"}
    together, groups, alone = (rows[name] for name in ("all chips", "groups of 16", "each chip"))
    assert together["all_reduces"] <= 2 * NORMS < groups["all_reduces"]  # and those that the averages follow
    assert alone["all_reduces"] < together["all_reduces"] and alone["in_branches"] == 0
    assert together["in_branches"] == NORMS
    for row in rows.values():
        assert row["chips"] == 32 and min(row["temporary_bytes"], row["traffic_bytes"], row["flops"]) > 0
    assert "| 32xh100 | 32 | groups of 16 |" in (tmp_path / "pod.md").read_text()
