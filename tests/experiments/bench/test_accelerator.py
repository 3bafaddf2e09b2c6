"""Tests the benchmark for accelerators on the CPU: its reference, its clock on made-up profiles, and a whole run."""

from types import SimpleNamespace

import numpy as np
import pytest

from experiments import jsonl
from experiments.bench.accelerator import clock, conformance, pages, programs
from tests.support import oracle
from tests.support.programs import finish, start


def test_the_reference_is_the_oracle_s():
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, 6, 4, 3))
    mask = np.array([1, 1, 0, 1, 0, 1], bool)[:, None, None]
    y, dx = conformance.reference(x, dy, mask)
    wanted = oracle.batch_norm(x, np.ones(3), np.zeros(3), dy, (2,), conformance.EPSILON, mask)
    np.testing.assert_allclose(y, wanted.y, rtol=0, atol=1e-12)
    np.testing.assert_allclose(dx, wanted.dx, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_errors_of_each_layer_are_those_of_its_rounding():
    rows = list(conformance.rows((8, 2, 2, 4)))
    ours = [row for row in rows if row["norm"] == "bnjax" and row["dtype"] == "float32"]
    assert len(ours) == 2 * len(conformance.RATIOS)
    assert all(row["y"] < 1e-6 and row["dx"] < 1e-6 for row in ours)
    assert any(row["y"] > 1e-4 for row in rows if row["norm"] == "flax.linen")


def _line(name, *events):
    return SimpleNamespace(name=name, events=[SimpleNamespace(start_ns=a, duration_ns=d) for a, d in events])


def _plane(name, *lines):
    return SimpleNamespace(name=name, lines=lines)


@pytest.mark.parametrize(
    ("planes", "nanoseconds"),
    [
        ([_plane("/host:CPU", _line("python", (0, 100)))], 0),
        ([_plane("/device:TPU:0", _line("XLA Modules", (0, 10), (30, 10)), _line("XLA Ops", (0, 5)))], 20),
        ([_plane("/device:GPU:0", _line("Stream #1(Compute)", (0, 10)), _line("Stream #2(Memcpy)", (5, 10)))], 15),
        ([_plane(f"/device:GPU:{i}", _line("Stream #1", (0, 10 + i))) for i in range(3)], 12),
    ],
)
def test_the_device_s_clock_counts_what_overlaps_once(planes, nanoseconds):
    assert clock.busy_seconds(planes) == pytest.approx(nanoseconds * 1e-9)


def test_without_a_device_s_clock_the_host_s_counts():
    took = clock.timed(lambda: np.zeros(()), 3)
    assert took.clock == "host" and took.seconds > 0


@pytest.mark.slow
def test_a_whole_run(tmp_path):
    """Checks that --smoke measures every program in every library on two devices, and writes all three files."""
    two = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    module = "experiments.bench.accelerator"
    out = finish(start("--smoke", "--out", tmp_path, module=module, environment=two))
    about, *rows = jsonl.read(tmp_path / "accelerator.jsonl")
    assert about["devices"] == "2" and "Please send in" in out
    for part in ("layer", "small layer", "ResNet-50 step"):
        assert [row["norm"] for row in rows if row["part"] == part] == list(programs.NAMES)
    assert sum(row["part"] == "pooling" for row in rows) == 2 and "An all-reduce" in out
    assert pages.text(about, rows) in (tmp_path / "accelerator.md").read_text()
    assert (tmp_path / "accelerator.png").read_bytes().startswith(b"\x89PNG")
