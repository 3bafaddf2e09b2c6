"""Times programs by the clock of the device, or by that of the host if the profiler has no record of the device.

A call costs the host tens of microseconds, which a small layer on an accelerator does not take. So the calls are
profiled, and the time is that in which the device was busy with them. For a CPU there is no such record: the host waits
for the calls, and divides.
"""

import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

Run = Callable[[], Any]  # starts a program and returns its results, which may not be ready


class Time(NamedTuple):
    """The seconds that one call takes, and whose clock says so: "device" or "host"."""

    seconds: float
    clock: str


def timed(run: Run, calls: int) -> Time:
    """Times one call of a program that is compiled and warm.

    Args:
      run: starts the program.
      calls: how often it is called; the time is the average.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            started = time.perf_counter()
            for _ in range(calls):
                out = run()
            jax.block_until_ready(out)
            by_host = (time.perf_counter() - started) / calls
        files = sorted(Path(folder).rglob("*.xplane.pb"))
        planes = list(jax.profiler.ProfileData.from_file(str(files[0])).planes) if files else []
        busy = busy_seconds(planes)
    return Time(busy / calls, "device") if busy else Time(by_host, "host")


def busy_seconds(planes: Iterable[Any]) -> float:
    """Returns the seconds in which the busiest accelerator of a profile ran a program, or 0 where it has no record.

    Args:
      planes: of `jax.profiler.ProfileData`. TPUs record whole programs in the line "XLA Modules", GPUs each kernel in a
        line for its stream.
    """
    found = []
    for plane in planes:
        if plane.name.startswith("/device:") and "CPU" not in plane.name:
            lines = {line.name: line for line in plane.lines}
            chosen = [lines["XLA Modules"]] if "XLA Modules" in lines else _streams(lines)
            found.append(covered([(e.start_ns, e.start_ns + e.duration_ns) for line in chosen for e in line.events]))
    return max(found, default=0) * 1e-9


def _streams(lines: dict[str, Any]) -> list[Any]:
    """Returns the lines of a GPU's streams."""
    return [line for name, line in lines.items() if name.startswith("Stream")]


def covered(intervals: Sequence[tuple[float, float]]) -> float:
    """Returns the length of the union of intervals (start, end), so that what runs side by side counts once."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
