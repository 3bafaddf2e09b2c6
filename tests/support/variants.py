"""Lists the variants, whose properties test_variants.py tests; a new variant adds its row here.

A row defines a variant four times: as function, as linen module, as nnx module, and as a formula in plain jax.numpy
that autodiff differentiates in float64. The formula is taken from the paper and uses nothing of bnjax.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import bnjax
from tests.support import naive

MOMENTUM = 0.9
EPSILON = 1e-5


def normalised(x, scale, bias, running, features):
    """Computes BatchNorm in evaluation."""
    rows = tuple(a for a in range(x.ndim) if a not in features)
    mean, var, scale, bias = (jnp.expand_dims(v, rows) for v in (running.mean, running.var, scale, bias))
    return (x - mean) / jnp.sqrt(var + EPSILON) * scale + bias


@dataclasses.dataclass(frozen=True, eq=False)
class Variant:
    """One row: the function, the fields of the modules, and the formula.

    `train` and `formula` take the running averages (mean, var, steps), and return y and the averages after the step.
    """

    name: str  # of the modules: bnjax.linen.<name>, bnjax.nnx.<name>
    train: Callable[..., Any]  # (x, scale, bias, running, *, axis, mask, axis_name, dtype) -> y, RunningStats
    formula: Callable[..., Any]  # (x, scale, bias, running, features, mask) -> y, mean, var; of whole batches
    evaluate: Callable[..., Any] = bnjax.normalize  # (x, mean, var, scale, bias, *, axis, dtype) -> y
    evaluation_formula: Callable[..., Any] = normalised  # (x, scale, bias, running, features) -> y
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)  # of both modules
    call: dict[str, Any] = dataclasses.field(default_factory=dict)  # options of both modules at the call
    lead: tuple[int, ...] = ()  # axes of the running averages before the feature axes, such as one for domains
    affine_lead: tuple[int, ...] = ()  # axes of scale and bias before the feature axes
    steps: bool = False  # whether the running averages count steps

    def __str__(self):
        return self.name


def updating(function, **own):
    """Makes `train` of a functional variant that returns y and moments, with the usual update of running averages."""

    def train(x, scale, bias, running, **options):
        y, moments = function(x, scale, bias, **own, **options)
        return y, bnjax.update_running(running, moments, momentum=MOMENTUM)

    return train


def averaged(running, x, features, mask):
    """Computes the running averages after a batch, from the moments of all its rows; empty channels keep theirs."""
    mean, var, count = (v.reshape(running.mean.shape) for v in naive.moments(x, features, mask))
    pairs = ((running.mean, mean), (running.var, var))
    return tuple(jnp.where(count < 1e-200, old, MOMENTUM * old + (1 - MOMENTUM) * new) for old, new in pairs)


# GhostBatchNorm -------------------------------------------------------------------------------------------------------

VIRTUAL = 2  # rows of the first axis: a device holds two or more virtual batches, and so does a batch of one device


def _ghost(x, scale, bias, running, features, mask):
    """Normalizes every virtual batch by itself; the running averages are those of the whole batch."""
    axis = min(set(range(x.ndim)) - set(features))
    cut = lambda a: jnp.broadcast_to(a, x.shape).reshape(*x.shape[:axis], -1, VIRTUAL, *x.shape[axis + 1 :])  # noqa: E731
    alone = lambda x, mask: naive.batch_norm(x, scale, bias, features, EPSILON, mask)  # noqa: E731
    y = jax.vmap(alone, axis, axis)(cut(x), cut(True if mask is None else mask))
    return y.reshape(x.shape), *averaged(running, x, features, mask)


# BatchRenorm ----------------------------------------------------------------------------------------------------------

R_MAX, D_MAX = 1.2, 0.5  # tight enough that some channels are clipped and others not


def _renorm(x, scale, bias, running, features, mask):
    rows = tuple(a for a in range(x.ndim) if a not in features)
    mean, var, scale, bias = (jnp.expand_dims(v, rows) for v in (running.mean, running.var, scale, bias))
    batch_mean, batch_var, _ = naive.moments(x, features, mask)
    sigma, batch_sigma = jnp.sqrt(var + EPSILON), jnp.sqrt(batch_var + EPSILON)
    r = jax.lax.stop_gradient(jnp.clip(batch_sigma / sigma, 1 / R_MAX, R_MAX))
    d = jax.lax.stop_gradient(jnp.clip((batch_mean - mean) / sigma, -D_MAX, D_MAX))
    xhat = (naive.readable(x, batch_mean, mask) - batch_mean) / batch_sigma * r + d
    return xhat * scale + bias, *averaged(running, x, features, mask)


def _train_renorm(x, scale, bias, running, **options):
    limits = dict(r_max=R_MAX, d_max=D_MAX)
    y, moments = bnjax.functional.batch_renorm(x, running.mean, running.var, scale, bias, **limits, **options)
    return y, bnjax.update_running(running, moments, momentum=MOMENTUM)


# SplitBatchNorm -------------------------------------------------------------------------------------------------------

DOMAINS, DOMAIN = 3, 1


def _split(x, scale, bias, running, features, mask, affine=lambda v: v[DOMAIN]):
    y = naive.batch_norm(x, affine(scale), affine(bias), features, EPSILON, mask)
    own = averaged(jax.tree.map(lambda v: v[DOMAIN], running), x, features, mask)
    return y, *(old.at[DOMAIN].set(new) for old, new in zip(running[:2], own, strict=True))


def _train_split(x, scale, bias, running, **options):
    y, moments = bnjax.functional.split_batch_norm(x, DOMAIN, scale, bias, **options)
    return y, bnjax.functional.update_split_running(running, moments, DOMAIN, momentum=MOMENTUM)


def _evaluate_split(x, mean, var, scale, bias, **options):
    return bnjax.functional.split_normalize(x, DOMAIN, mean, var, scale, bias, **options)


def _split_normalised(x, scale, bias, running, features, affine=lambda v: v[DOMAIN]):
    return normalised(x, affine(scale), affine(bias), jax.tree.map(lambda v: v[DOMAIN], running), features)


# FrozenBatchNorm ------------------------------------------------------------------------------------------------------


def _train_frozen(x, scale, bias, running, axis_name=None, **options):
    return bnjax.functional.frozen_batch_norm(x, *running[:2], scale, bias, **options), running


def _frozen_normalised(x, scale, bias, running, features):
    return normalised(x, jax.lax.stop_gradient(scale), jax.lax.stop_gradient(bias), running, features)


def _frozen(x, scale, bias, running, features, mask):
    mean = jnp.expand_dims(running.mean, tuple(set(range(x.ndim)) - set(features)))
    return _frozen_normalised(naive.readable(x, mean, mask), scale, bias, running, features), *running[:2]


# PowerNorm, MovingAverageBatchNorm ------------------------------------------------------------------------------------
# Here without their gradient statistics, which test_gradient_state.py tests.


def _about_zero(x, features, mask):
    """Computes E[x²] and the count, with the rank of x."""
    mean, var, count = naive.moments(x, features, mask)
    return mean**2 + var, count


def _by_square(square, x, scale, bias, features, mask):
    rows = tuple(a for a in range(x.ndim) if a not in features)
    scale, bias = jnp.expand_dims(scale, rows), jnp.expand_dims(bias, rows)
    return naive.readable(x, 0, mask) / jnp.sqrt(square + EPSILON) * scale + bias


def _averaged_about_zero(running, x, features, mask, new=1 - MOMENTUM):
    square, count = (v.reshape(running.mean.shape) for v in _about_zero(x, features, mask))
    mean, var = (1 - new) * running.mean, (1 - new) * running.var + new * square
    return jnp.where(count < 1e-200, running.mean, mean), jnp.where(count < 1e-200, running.var, var)


def _power(x, scale, bias, running, features, mask):
    rows = tuple(a for a in range(x.ndim) if a not in features)
    y = _by_square(jnp.expand_dims(running.var, rows), x, scale, bias, features, mask)
    return y, *_averaged_about_zero(running, x, features, mask)


def _train_power(x, scale, bias, running, **options):
    y, moments = bnjax.functional.power_norm(x, running.var, None, scale, bias, **options)
    return y, bnjax.update_running(running, moments, momentum=MOMENTUM)


def _moving_average(x, scale, bias, running, features, mask):
    y = _by_square(_about_zero(x, features, mask)[0], x, scale, bias, features, mask)
    new = (1 - MOMENTUM) / (1 - MOMENTUM ** (running.steps + 1))  # the initial value has no weight in the average
    return y, *_averaged_about_zero(running, x, features, mask, new)


def _train_moving_average(x, scale, bias, running, **options):
    y, moments = bnjax.functional.moving_average_batch_norm(x, running.var, None, scale, bias, **options)
    return y, bnjax.update_running(running, moments, momentum=MOMENTUM, debias=True)


VARIANTS = [
    Variant(
        "GhostBatchNorm",
        train=updating(bnjax.functional.ghost_batch_norm, virtual_batch_size=VIRTUAL),
        formula=_ghost,
        fields=dict(virtual_batch_size=VIRTUAL),
    ),
    Variant("BatchRenorm", train=_train_renorm, formula=_renorm, fields=dict(r_max=R_MAX, d_max=D_MAX)),
    Variant(
        "SplitBatchNorm",
        train=_train_split,
        formula=_split,
        evaluate=_evaluate_split,
        evaluation_formula=_split_normalised,
        fields=dict(num_domains=DOMAINS),
        call=dict(domain=DOMAIN),
        lead=(DOMAINS,),
        affine_lead=(DOMAINS,),
    ),
    Variant(
        "SplitBatchNorm",
        train=_train_split,
        formula=partial(_split, affine=lambda v: v),
        evaluate=_evaluate_split,
        evaluation_formula=partial(_split_normalised, affine=lambda v: v),
        fields=dict(num_domains=DOMAINS, domain=DOMAIN, shared_affine=True),
        lead=(DOMAINS,),
    ),
    Variant(
        "FrozenBatchNorm",
        train=_train_frozen,
        formula=_frozen,
        evaluate=bnjax.functional.frozen_batch_norm,
        evaluation_formula=_frozen_normalised,
    ),
    Variant("PowerNorm", train=_train_power, formula=_power),
    Variant("MovingAverageBatchNorm", train=_train_moving_average, formula=_moving_average, steps=True),
]
