"""Converters by library, for tests that hold for each, and a network to convert."""

import pytest

from bnjax import tools
from tests.support import zoo

# library -> from there, to there, what stands between names there
LIBRARIES = {"torch": (tools.from_torch, tools.to_torch, "."), "keras": (tools.from_keras, tools.to_keras, "/")}
each_library = pytest.mark.parametrize("library", LIBRARIES)


def network():
    """Variables with values, and other variables of the same network."""
    _, variables = zoo.linen_net()
    return variables, zoo.trained(variables, 5)
