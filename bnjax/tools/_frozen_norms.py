"""Batch normalization that runs on its running statistics in a model that trains."""

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import jax

from bnjax.tools import _trees
from bnjax.tools._layers import Call, described, handling, is_norm


@contextmanager
def frozen_norms(layers: Sequence[str] | None = None) -> Iterator[None]:
    r"""Runs linen batch normalization layers on their running statistics, which stay, while the context is open.

    .. math:: y = \frac{x - \mathrm{mean}_\text{running}}{\sqrt{\mathrm{var}_\text{running} + \epsilon}}
              \cdot \mathrm{scale} + \mathrm{bias}

    Fine-tuning with frozen batch normalization, for a model whose own `train` flag also turns dropout on. It may stand
    inside a jitted function or around its calls. Gradients still flow to scale and bias; see
    :func:`affine_labels` to freeze these. nnx modules need no context: use
    `model.set_attributes(bnjax.nnx.BatchNorm, use_running_average=True)`, and `False` to unfreeze
    (`flax.nnx.BatchNorm` for Flax's own layers).

    It holds for one thread, and must be entered in an ordinary function: a coroutine or a generator could pause within
    it, and code that runs meanwhile would be frozen too.

    Args:
      layers: patterns of the layers to freeze, such as `"block1/*"`; all by default.

    Returns:
      A context manager.

    Raises:
      ValueError: `layers` is one string or empty; or a layer whose class does not say what it computes
        (:class:`bnjax.Normalization`).
      RuntimeError: entered in a coroutine or a generator.

    Examples:
      >>> import jax, jax.numpy as jnp, bnjax
      >>> from bnjax import tools
      >>> norm, x = bnjax.linen.BatchNorm(use_running_average=False), jnp.array([[4.0], [6.0]])
      >>> variables = norm.init(jax.random.key(0), x)
      >>> with tools.frozen_norms():
      ...     print(jnp.round(norm.apply(variables, x)).T)
      [[4. 6.]]
    """
    chosen = _trees.check_patterns(layers)
    refuse_where_code_pauses("frozen_norms")

    def run(call: Call) -> jax.Array:
        named = chosen is None or any(_trees.matches(call.path, p) for p in chosen)
        if is_norm(call.module) and named:
            described(call.module, call.path)
            return call.run_on_running_average(call.x)
        return call.run(call.x)

    with handling(run, key=("frozen", chosen)):
        yield


_PAUSES = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR | inspect.CO_ITERABLE_COROUTINE


def refuse_where_code_pauses(name: str) -> None:
    """Raises RuntimeError if the context manager `name`, which calls this, is being entered in code that can pause.

    Helpers written with `contextlib.contextmanager` and methods named `__enter__` are looked through: what counts is
    the code that enters them.
    """
    frame = sys._getframe(2)  # of contextlib, which runs the body of the context manager
    while frame.f_back is not None:
        helper = frame.f_code.co_flags & inspect.CO_GENERATOR and _is_contextlib(frame.f_back)
        if not (helper or _is_contextlib(frame) or frame.f_code.co_name == "__enter__"):
            break
        frame = frame.f_back
    if frame.f_code.co_flags & _PAUSES:
        raise RuntimeError(
            f"{name} was entered in {frame.f_code.co_name}, a coroutine or a generator: it could pause within the "
            "context, and other code that runs meanwhile would be changed too. Write the with statement in an ordinary "
            f"function that {frame.f_code.co_name} calls."
        )


def _is_contextlib(frame: object) -> bool:
    return getattr(frame, "f_globals", {}).get("__name__") == "contextlib"
