"""What the compilers of TPUs and GPUs make of a layer: compiled, not run (`experiments.bench.compiled.aot`)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHANNELS = 128
pytestmark = pytest.mark.aot


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """In a process of its own: the compilers want to be set up before JAX makes a device."""
    out, root = tmp_path_factory.mktemp("aot") / "quick.jsonl", Path(__file__).parents[3]
    command = [sys.executable, "-m", "experiments.bench.compiled.aot", "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in out.read_text().splitlines()]


def _of(rows, norm):
    return {(row["program"], row["target"]): row for row in rows if row["norm"] == norm}


def test_a_layer_makes_seven_passes(rows):
    ours = _of(rows, "bnjax")
    assert ours["layer", "v5e:2x2"]["traffic"] <= 7.05 and ours["layer", "h100"]["traffic"] <= 7.05


def test_never_more_than_flax(rows):
    """Than its fast mode: traffic and memory (to 2 % of an activation: vectors), and collectives."""
    theirs = _of(rows, "flax.linen")
    for key, row in _of(rows, "bnjax").items():
        for measure in ("traffic", "temporary_memory"):
            assert row[measure] <= theirs[key][measure] + 0.02, (key, measure)
        assert len(row["all_reduces"]) <= len(theirs[key]["all_reduces"]), key


def test_the_guard_is_a_branch_that_is_not_taken(rows):
    """XLA:GPU may turn a conditional into both of its sides and a choice: one read of x more in every step."""
    for key, row in _of(rows, "bnjax").items():
        assert 0.9 < row["traffic_of_branches"] < 1.1, key


def test_one_small_all_reduce_each_way(rows):
    """At 4 chips and at 256, with a mask too."""
    for (program, target), row in _of(rows, "bnjax").items():
        assert len(row["all_reduces"]) == (0 if target == "h100" else 2), (program, target)
        assert all(payload <= 3 * CHANNELS for payload in row["all_reduces"]), (program, target)
