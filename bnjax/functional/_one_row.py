"""Warns about a batch with one row per channel: its variance is zero, so y is the bias whatever x is."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from bnjax.functional._axes import Layout
from bnjax.functional._collectives import Group, group_size

_SILENT: ContextVar[bool] = ContextVar("silent", default=False)


class OneRowWarning(UserWarning):
    """Warning that a batch with one row per channel was normalised by its own statistics, so that y is the bias alone.

    It is given when a call is traced. It is not given in `init`, in evaluation, or where a mask leaves one row.

    Examples:
      >>> import warnings, jax.numpy as jnp, bnjax
      >>> with warnings.catch_warnings():
      ...     warnings.simplefilter("ignore", bnjax.OneRowWarning)
      ...     y, _ = bnjax.batch_norm(jnp.array([[7.0, 8.0]]))
      >>> print(y)
      [[0. 0.]]
    """


@contextmanager
def silent_if(starting: bool) -> Iterator[None]:
    """Suppresses the warning within the context if `starting`, because models are often initialised with one row."""
    token = _SILENT.set(starting or _SILENT.get())
    try:
        yield
    finally:
        _SILENT.reset(token)


def warn_of_one_row(shape: tuple[int, ...], layout: Layout, group: Group) -> None:
    """Warns at trace time if all devices of the group together hold one row per channel; the mask is not looked at.

    Args:
      shape: of x.
      layout: of x.
      group: the devices that share statistics.
    """
    rows = math.prod(shape[a] for a in layout.rows) * group_size(group)
    if rows != 1 or _SILENT.get() or not math.prod(layout.shape):
        return
    warnings.warn(
        f"a batch of shape {shape} has 1 row for each of its channels (feature axes {layout.features}), so that its "
        "variance is 0 and y is the bias whatever x is. Take more rows, pool over devices with axis_name, pass "
        "use_running_average=True to evaluate, or normalise by groups or layers.",
        OneRowWarning,
        stacklevel=4,
    )
