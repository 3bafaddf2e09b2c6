"""Gives each kind of tree to a test that asks for `tree`."""

import pytest

from tests.tools.statistics.trees import TREES


@pytest.fixture(params=TREES)
def tree(request):
    return TREES[request.param]()
