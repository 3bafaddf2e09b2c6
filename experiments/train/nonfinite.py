"""Steps whose gradient is not finite change nothing: neither parameters, nor the optimizer, nor the statistics."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.training.dynamic_scale import DynamicScale

from experiments.errors import RunError

NEVER = 2**31 - 1  # optax applies a NaN after so many in a row; here the host ends the run long before


def skip_nonfinite(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optimizer`, which leaves out every step whose gradient is not finite."""
    return optax.apply_if_finite(optimizer, max_consecutive_errors=NEVER)


def skipped(opt_state: Any) -> dict[str, jax.Array]:
    """The metric `skipped`: how many steps in a row changed nothing. Empty for an optimizer that leaves none out."""
    return {"skipped": opt_state.notfinite_count} if isinstance(opt_state, optax.ApplyIfFiniteState) else {}


def unless_skipped(opt_state: Any, new: Any, old: Any) -> Any:
    """`new`, or `old` where the optimizer left the step out.

    BN keeps the running averages of a channel whose own moments are not finite. This is for the others: the layers and
    channels that a bad record did not reach, and a loss that overflows in half precision behind good statistics.
    """
    if not isinstance(opt_state, optax.ApplyIfFiniteState):
        return new
    return jax.tree.map(lambda new, old: jnp.where(opt_state.last_finite, new, old), new, old)


def initial_scale() -> DynamicScale:
    """The first factor of the loss in float16, 2¹⁶: halved at each overflow, doubled after 2,000 steps without one."""
    return DynamicScale(fin_steps=jnp.int32(0), scale=jnp.float32(65536))


def value_and_grad(objective: Callable[[Any], Any], params: Any, scale: DynamicScale | None) -> tuple[Any, Any, Any]:
    """The value with its auxiliary part, the gradient by way of `scale` times the loss, and the scale after it."""
    if scale is None:
        value, grads = jax.value_and_grad(objective, has_aux=True)(params)
        return value, grads, None
    scale, _, value, grads = scale.value_and_grad(objective, has_aux=True)(params)
    return value, grads, scale


def check(rows: Sequence[Mapping[str, Any]], last: int, limit: int) -> None:
    """Raises RunError where more than `limit` steps in a row had no finite gradient; `last` is the step of the end."""
    for step, row in enumerate(rows, start=last - len(rows) + 1):
        if row["skipped"] > limit:
            raise RunError(
                f"no finite gradient in {row['skipped']} steps in a row, up to step {step}: they changed nothing. Look "
                "for NaN in the data or lower --lr; --skip-nonfinite sets how many are borne"
            )
