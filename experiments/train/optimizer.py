"""Builds AdamW with warm-up and cosine decay; only the kernels are decayed."""

import optax

from bnjax.tools import decay_mask


def warmup_cosine(peak: float, steps: int, warmup: float) -> optax.Schedule:
    """Returns a schedule that rises linearly from 0 to `peak` in the fraction `warmup` of the steps, then decays by
    half a cosine to 0.
    """
    return optax.warmup_cosine_decay_schedule(0.0, peak, round(warmup * steps), steps)


def adamw(schedule: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """Returns AdamW whose weight decay leaves out scales and biases."""
    return optax.adamw(schedule, weight_decay=weight_decay, mask=decay_mask)
