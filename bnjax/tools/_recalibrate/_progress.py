"""Passes over batches, shown to who waits for them."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

Progress = Callable[[int], None] | bool


def shown(batches: Iterable[Any], progress: Progress, label: str) -> Iterator[Any]:
    """Yields the batches, and shows on the first process how far they are: a bar, or one line where none can be shown.

    Args:
      batches: the batches.
      progress: whether to show anything; or a function, which is called with the number of batches done instead.
      label: what the pass is about.
    """
    if callable(progress):
        for done, batch in enumerate(batches, start=1):
            yield batch
            progress(done)
        return
    if not progress or jax.process_index() > 0:
        yield from batches
        return
    start, done, bar = time.monotonic(), 0, _bar(batches, label)
    for batch in batches if bar is None else bar:
        yield batch
        done += 1
    if bar is None:
        print(f"{label}: {done} batches in {time.monotonic() - start:.1f} s", file=sys.stderr)


def _bar(batches: Iterable[Any], label: str) -> Any:
    """Returns a tqdm bar over the batches; None where tqdm is not installed or nobody would see the bar move."""
    try:
        from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        return None
    return tqdm(batches, desc=label) if sys.stderr.isatty() else None
