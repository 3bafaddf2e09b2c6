"""Times `import bnjax` and the imports of its dependencies, in fresh interpreters, interleaved.

The interpreters cache byte code in a folder of their own, as they would for an installed package.
"""

import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

PACKAGES = {
    "flax": "import flax",  # flax.linen comes with it
    "flax.linen, flax.nnx": "import flax.linen, flax.nnx",
    "bnjax": "import bnjax",
}
_TIMED = "from time import perf_counter; begin = perf_counter(); {}; print(perf_counter() - begin)"


def measure(rounds: int) -> Iterator[dict[str, Any]]:
    """Yields a row for each package: its median import time, and its ratio to importing flax.linen and flax.nnx."""
    times: dict[str, list[float]] = {name: [] for name in PACKAGES}
    order = list(PACKAGES)
    shuffle = random.Random(0).shuffle
    with tempfile.TemporaryDirectory() as folder:
        for done in range(rounds + 1):
            shuffle(order)
            for name in order:
                seconds = float(printed(_TIMED.format(PACKAGES[name]), folder))
                if done:  # the first round writes the byte code
                    times[name].append(seconds)
    base = times["flax.linen, flax.nnx"]
    for name, own in times.items():
        low, median, high = statistics.quantiles(own, n=4)
        yield {
            "part": "imports",
            "package": name,
            "milliseconds": round(median * 1e3, 1),
            "spread": round((high - low) / 2 / median, 3),
            "to_flax": round(statistics.median(a / b for a, b in zip(own, base, strict=True)), 3),
            "rounds": rounds,
        }


def printed(code: str, bytecode: str) -> str:
    """Returns the standard output of a fresh interpreter, whose byte code is cached in the folder `bytecode`."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": bytecode, "JAX_PLATFORMS": "cpu"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
    ).stdout
