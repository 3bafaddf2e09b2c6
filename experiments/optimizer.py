"""AdamW with warm-up and cosine decay, and weight decay for the kernels alone."""

from typing import Any

import jax
import optax

NOT_DECAYED = ("scale", "bias")  # what normalisation layers own, and every bias


def warmup_cosine(peak: float, steps: int, warmup: float) -> optax.Schedule:
    """Linear from 0 to `peak` over the fraction `warmup` of the steps, then half a cosine down to 0."""
    return optax.warmup_cosine_decay_schedule(0.0, peak, round(warmup * steps), steps)


def decay_mask(params: Any) -> Any:
    """True where weight decay applies. By name, not by rank, which says nothing about the role."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in NOT_DECAYED, params)


def adamw(schedule: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """AdamW whose decay leaves the scales and biases out."""
    return optax.adamw(schedule, weight_decay=weight_decay, mask=decay_mask)
