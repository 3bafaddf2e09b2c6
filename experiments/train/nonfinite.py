"""Skips steps whose gradient is not finite: parameters, optimizer state and statistics then stay as they are."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.training.dynamic_scale import DynamicScale

from experiments.errors import RunError

NEVER = 2**31 - 1  # optax applies a NaN after this many skips in a row; here the host ends the run long before that


def skip_nonfinite(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Wraps `optimizer` so that a step whose gradient is not finite changes nothing."""
    return optax.apply_if_finite(optimizer, max_consecutive_errors=NEVER)


def skipped(opt_state: Any) -> dict[str, jax.Array]:
    """Returns the metric `skipped`, the number of skipped steps in a row; empty for an optimizer that never skips."""
    return {"skipped": opt_state.notfinite_count} if isinstance(opt_state, optax.ApplyIfFiniteState) else {}


def unless_skipped(opt_state: Any, new: Any, old: Any) -> Any:
    """Returns `new`, or `old` where the optimizer skipped the step.

    BN itself keeps the running averages of a channel whose moments are not finite. This also restores the averages of
    channels whose own moments are finite: a bad record did not reach them, or the loss overflowed in half precision
    behind good statistics.
    """
    if not isinstance(opt_state, optax.ApplyIfFiniteState):
        return new
    return jax.tree.map(lambda new, old: jnp.where(opt_state.last_finite, new, old), new, old)


def initial_scale() -> DynamicScale:
    """Returns the first loss scale for float16, 2¹⁶; it halves at an overflow and doubles after 2,000 steps without
    one.
    """
    return DynamicScale(fin_steps=jnp.int32(0), scale=jnp.float32(65536))


def value_and_grad(objective: Callable[[Any], Any], params: Any, scale: DynamicScale | None) -> tuple[Any, Any, Any]:
    """Computes value (with auxiliary output) and gradient, with loss scaling if `scale` is given; returns the new scale
    too.
    """
    if scale is None:
        value, grads = jax.value_and_grad(objective, has_aux=True)(params)
        return value, grads, None
    scale, _, value, grads = scale.value_and_grad(objective, has_aux=True)(params)
    return value, grads, scale


def check(rows: Sequence[Mapping[str, Any]], last: int, limit: int) -> None:
    """Raises RunError if more than `limit` steps in a row were skipped; `last` is the step number of the last row."""
    for step, row in enumerate(rows, start=last - len(rows) + 1):
        if row["skipped"] > limit:
            raise RunError(
                f"no finite gradient in {row['skipped']} steps in a row, up to step {step}: they changed nothing. Look "
                "for NaN in the data or lower --lr; --skip-nonfinite sets how many are allowed"
            )
