"""AdamW with warm-up and cosine decay, and weight decay for the kernels alone."""

import optax

from bnjax.tools import decay_mask


def warmup_cosine(peak: float, steps: int, warmup: float) -> optax.Schedule:
    """Linear from 0 to `peak` over the fraction `warmup` of the steps, then half a cosine down to 0."""
    return optax.warmup_cosine_decay_schedule(0.0, peak, round(warmup * steps), steps)


def adamw(schedule: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """AdamW whose decay leaves the scales and biases out."""
    return optax.adamw(schedule, weight_decay=weight_decay, mask=decay_mask)
