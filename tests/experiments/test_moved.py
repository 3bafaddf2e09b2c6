"""Tests that old commands print their new name and do nothing else."""

import importlib
import importlib.util

import pytest

from experiments.moved import MOVED, message
from tests.support.programs import finish, start


@pytest.mark.parametrize("name", ["repro_wu2018_figure1", "bench.layers", "bench.fusion"])
def test_an_old_command_ends_with_its_new_name(name):
    assert finish(start("--smoke", module=f"experiments.{name}"), status=2) == f"{message(name)}\n"


@pytest.mark.parametrize("name", MOVED)
def test_every_new_name_is_a_program(name):
    assert importlib.util.find_spec(f"experiments.{MOVED[name]}").has_location
    assert not importlib.util.find_spec(f"experiments.{name}").has_location


def test_an_import_of_an_old_name_is_an_import_error():
    with pytest.raises(ModuleNotFoundError, match=r"experiments\.plots is experiments\.train\.plots now"):
        importlib.import_module("experiments.plots")
    assert importlib.util.find_spec("experiments.nothing") is None
