"""Times that can be compared: interleaved, in an order that changes, warm, with the machine's noise in view.

Whatever is compared runs in one process and in turns, for the machine is shared and drifts. The order is shuffled in
each round, because some orders favour some candidates, and the second of two calls counts.
"""

import random
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

Run = Callable[[], None]  # does the work, and returns when it is done


class Seconds(NamedTuple):
    """Of one candidate, over the rounds."""

    median: float
    least: float
    spread: float  # half the distance of the quartiles, relative to the median


def interleaved(runs: Mapping[str, Run], *, rounds: int, seconds: float, seed: int = 0) -> dict[str, Seconds]:
    """The time of each run, from at most `rounds` rounds and, after the first five, about so many seconds."""
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
    low, median, high = np.percentile(values, (25, 50, 75))
    return Seconds(float(median), float(values.min()), float((high - low) / 2 / median))
