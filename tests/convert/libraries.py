"""Lists the converters by library, for tests that hold for each, and builds a network to convert."""

import pytest

from bnjax import tools
from tests.support import zoo

# library -> from there, to there, what stands between names there
LIBRARIES = {"torch": (tools.from_torch, tools.to_torch, "."), "keras": (tools.from_keras, tools.to_keras, "/")}
each_library = pytest.mark.parametrize("library", LIBRARIES)


def network():
    """Returns variables of a network, and other variables of the same network to be filled."""
    _, variables = zoo.linen_net()
    return variables, zoo.trained(variables, 5)
