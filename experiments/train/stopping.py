"""Turns SIGTERM and Ctrl-C into a request to stop: the loop saves a checkpoint and ends."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells if any process was asked to stop. A second signal has its usual effect."""
    requests: list[int] = []

    def note(number: int, _: object) -> None:
        requests.append(number)
        signal.signal(number, previous[signal.Signals(number)])

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: anywhere(bool(requests))
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def anywhere(here: bool) -> bool:
    """Returns True if `here` is True in any process, so that all of them leave the loop at the same step."""
    return here if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.bool_(here)).any())
