"""Tests how a process sets up its devices: patience of simulated ones, and machines with different numbers of them."""

import os
from types import SimpleNamespace

import jax
import pytest

from experiments.errors import ConfigError
from experiments.train.devices import WAITS, be_patient, data_mesh


def test_simulated_devices_wait_for_ten_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=AVX2")
    be_patient()
    assert os.environ["XLA_FLAGS"].split() == ["--xla_cpu_max_isa=AVX2", *(f"--{name}=600" for name in WAITS)]
    be_patient()
    assert os.environ["XLA_FLAGS"].count("timeout") == len(WAITS)


def test_the_limit_of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", f"--{WAITS[0]}=7")
    be_patient()
    assert f"--{WAITS[0]}=7" in os.environ["XLA_FLAGS"] and f"--{WAITS[0]}=600" not in os.environ["XLA_FLAGS"]


def test_processes_with_different_numbers_of_devices_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = (4, 4, 3)
    found = [SimpleNamespace(process_index=process) for process, count in enumerate(counts) for _ in range(count)]
    monkeypatch.setattr(jax, "devices", lambda: found)
    monkeypatch.setattr(jax, "process_count", lambda: len(counts))
    with pytest.raises(ConfigError, match=r"process 2 has 3 devices and process 0 has 4: .* or --devices 3"):
        data_mesh()
