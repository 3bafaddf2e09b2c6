"""Tests JSON lines: what is written can be read again, and a line that a crash cut short is ignored."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import jsonl

VALUES = {  # as given, and as read
    "numbers": ([1, 2.5, True, None], [1, 2.5, True, None]),
    "not finite": ([float("nan"), np.float32("inf")], [None, None]),
    "NumPy": (dict(scalar=np.float32(0.5), array=np.arange(4).reshape(2, 2)), dict(scalar=0.5, array=[[0, 1], [2, 3]])),
    "JAX": (jnp.array([1.5, np.nan]), [1.5, None]),
    "path": (Path("a") / "b", "a/b"),
    "text with lines": ("one\ntwo\u2028three", "one\ntwo\u2028three"),
}


@pytest.mark.parametrize("name", VALUES)
def test_what_is_written_is_read(name, tmp_path):
    given, wanted = VALUES[name]
    file = tmp_path / "lines.jsonl"
    jsonl.write(file, [{"value": 0}])
    jsonl.append(file, [{"value": given}])
    assert jsonl.read(file) == [{"value": 0}, {"value": wanted}]
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_line_that_was_cut_short_is_none(tmp_path):
    file = tmp_path / "lines.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert jsonl.read(file) == [{"step": 1}, {"step": 2}]


def test_digits_are_significant_ones():
    assert jsonl.plain({"large": 123456.789, "small": [1.23456789e-9], "count": 123456789}, 6) == {
        "large": 123457.0,
        "small": [1.23457e-9],
        "count": 123456789,
    }
    assert jsonl.plain(1 / 3) == 1 / 3
