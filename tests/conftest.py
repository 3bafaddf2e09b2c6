"""Configures pytest: eight simulated CPU devices, and implicit rank promotion in JAX is an error."""

import os
import zlib
from collections import defaultdict

import jax
import pytest

# Set before JAX creates a device. Processes that tests start set their own number of devices.
os.environ.pop("XLA_FLAGS", None)
if isa := os.environ.get("MAX_ISA"):  # such as AVX2: the vector units of another processor round otherwise
    os.environ["XLA_FLAGS"] = f"--xla_cpu_max_isa={isa}"
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

LARGE_TABLE = 8  # rows of one test function
KEPT = 6  # one row in so many of a larger table runs by default


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks most rows of large tables as `wide`: they run in .ci/run and with -m wide, the others by default.

    Which rows run by default follows from a hash of their names, so that it is the same everywhere, and a new row does
    not change it.
    """
    tables = defaultdict(list)
    for item in items:
        if not item.get_closest_marker("exhaustive"):
            tables[item.nodeid.partition("[")[0]].append(item)
    for rows in tables.values():
        kept = [item for item in rows if zlib.crc32(item.nodeid.encode()) % KEPT == 0] or rows[:1]
        if len(rows) > LARGE_TABLE:
            for item in set(rows) - set(kept):
                item.add_marker(pytest.mark.wide)
