"""Tests what the compilers of TPUs and GPUs make of a layer; it is not run (`experiments.bench.compiled.aot`)."""

import subprocess
import sys

import pytest

from experiments import jsonl
from tests.support.programs import ROOT

CHANNELS = 128
pytestmark = pytest.mark.aot


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Compiles in a separate process, because the compilers must be set up before JAX creates a device; returns the
    rows.
    """
    out = tmp_path_factory.mktemp("aot") / "quick.jsonl"
    command = [sys.executable, "-m", "experiments.bench.compiled.aot", "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return jsonl.read(out)


def _of(rows, norm):
    return {(row["program"], row["target"]): row for row in rows if row["norm"] == norm}


def test_a_layer_makes_seven_passes(rows):
    ours = _of(rows, "bnjax")
    assert ours["layer", "v5e:2x2"]["traffic"] <= 7.05 and ours["layer", "h100"]["traffic"] <= 7.05


def test_never_more_than_flax(rows):
    """Checks that traffic, memory and collectives are at most those of Flax's fast mode, to 2 % of an activation."""
    theirs = _of(rows, "flax.linen")
    for key, row in _of(rows, "bnjax").items():
        for measure in ("traffic", "temporary_memory"):
            assert row[measure] <= theirs[key][measure] + 0.02, (key, measure)
        assert len(row["all_reduces"]) <= len(theirs[key]["all_reduces"]), key


def test_the_guard_is_a_branch_that_is_not_taken(rows):
    """Checks that the guard's read of x is in a branch: XLA:GPU may instead run both sides in every step."""
    for key, row in _of(rows, "bnjax").items():
        assert 0.9 < row["traffic_of_branches"] < 1.1, key


def test_one_small_all_reduce_each_way(rows):
    """Checks for one small all-reduce forward and one backward, on 4 and on 256 chips, also with a mask."""
    for (program, target), row in _of(rows, "bnjax").items():
        assert len(row["all_reduces"]) == (0 if target == "h100" else 2), (program, target)
        assert all(payload <= 3 * CHANNELS for payload in row["all_reduces"]), (program, target)
