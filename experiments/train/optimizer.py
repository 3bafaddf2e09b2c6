"""Builds AdamW, SGD or LAMB with warm-up and cosine decay; only the kernels are decayed."""

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


def sgd(schedule: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """Returns SGD with a Nesterov momentum of 0.9, whose weight decay is added to the gradient of kernels."""
    decay = optax.add_decayed_weights(weight_decay, mask=decay_mask)
    return optax.chain(decay, optax.sgd(schedule, momentum=0.9, nesterov=True))


def lamb(schedule: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """Returns LAMB (You et al. 2020, https://arxiv.org/abs/1904.00962), whose weight decay leaves out scales and
    biases.
    """
    return optax.lamb(schedule, weight_decay=weight_decay, mask=decay_mask)


OPTIMIZERS = {"adamw": adamw, "sgd": sgd, "lamb": lamb}
