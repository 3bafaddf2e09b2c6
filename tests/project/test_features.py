"""Tests the README's table of features: each entry is what the library does here.

Flax is always tested; other libraries if they are installed. If a library gains a feature, this test fails: run
tests/fixtures/make_features.py, which updates the README.
"""

import json

import jax
import pytest

from tests.fixtures import make_features
from tests.fixtures.features_checks import CHECKS

RESULTS = json.loads(make_features.RESULTS.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("library", make_features.installed())
def test_features(library):
    with jax.numpy_rank_promotion("allow"):
        found = {name: make_features.tried(check, library) for name, check in CHECKS.items()}
    assert _verdicts(found) == _verdicts({name: cells[library] for name, cells in RESULTS["features"].items()})


def test_bnjax_has_them_all():
    assert {cells["bnjax"] for cells in RESULTS["features"].values()} == {"yes"}


def test_the_table_is_that_of_the_results():
    text = make_features.README.read_text()
    assert make_features.table(RESULTS) in text, "run python -m tests.fixtures.make_features --table"


def _verdicts(cells):
    return {name: cell.partition(":")[0] for name, cell in cells.items()}
