"""Times programs so that they can be compared: interleaved, in random order, warm, with the spread of the times.

All candidates run in one process in turns, because the machine is shared and drifts. The order is shuffled in each
round, because some orders favour some candidates; each candidate runs twice, and only the second call is timed.
"""

import random
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

Run = Callable[[], None]  # runs a program and waits for its result


class Seconds(NamedTuple):
    """The times of one candidate over the rounds."""

    median: float
    least: float
    spread: float  # half the distance of the quartiles, relative to the median


def interleaved(runs: Mapping[str, Run], *, rounds: int, seconds: float, seed: int = 0) -> dict[str, Seconds]:
    """Times each run in at most `rounds` rounds; after the first five, stops once `seconds` have passed."""
    order, shuffle = list(runs), random.Random(seed).shuffle
    times: dict[str, list[float]] = {name: [] for name in runs}
    begin = time.perf_counter()
    for done in range(rounds + 2):
        shuffle(order)
        for name in order:
            runs[name]()
            start = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - start)
        if done > 5 and time.perf_counter() - begin > seconds:
            break
    return {name: _summary(np.array(values[2:])) for name, values in times.items()}  # two rounds warm up


def _summary(values: np.ndarray) -> Seconds:
    """Returns median, minimum and spread of the times."""
    low, median, high = np.percentile(values, (25, 50, 75))
    return Seconds(float(median), float(values.min()), float((high - low) / 2 / median))
