"""Tests layers that the tools do not know: each tool reads them, or says what it cannot read and what to write."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax
from bnjax import tools

X = jnp.array([[4.0], [6.0]])


class Louder(nnx.BatchNorm):
    """A subclass with a __call__ of its own."""

    def __call__(self, x, **options):
        return 2 * super().__call__(x, **options)


class BatchNorm(nnx.Module):
    """A class that is merely named BatchNorm."""

    def __init__(self):
        self.mean, self.var = nnx.BatchStat(jnp.zeros(1)), nnx.BatchStat(jnp.ones(1))

    def __call__(self, x):
        return x


class LouderInLinen(bnjax.linen.BatchNorm):
    """A subclass in linen with a __call__ of its own."""

    @nn.compact
    def __call__(self, x):
        return 2 * super().__call__(x)


def in_linen(module):
    return functools.partial(module.apply, mutable=["batch_stats"]), module.init(jax.random.key(0), X)


def called(model, x):
    return model(x)


SAYS_NOTHING = "does not say what"
STRANGERS = {
    "subclass": (lambda: (called, Louder(1, use_running_average=True, rngs=nnx.Rngs(0))), SAYS_NOTHING),
    "name": (lambda: (called, BatchNorm()), SAYS_NOTHING),
    "linen": (lambda: in_linen(LouderInLinen(use_running_average=True)), "overrides __call__ but does not define"),
    "bridge": (
        lambda: in_linen(nnx.bridge.to_linen(bnjax.nnx.BatchNorm, 1, use_running_average=True)),
        "ToLinen hides a layer of another API: use the tool on the module that it wraps",
    ),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_what_cannot_be_read_is_named(name):
    make, says = STRANGERS[name]
    apply_fn, variables = make()
    with pytest.raises(ValueError, match=says):
        tools.recalibrate(apply_fn, variables, [X], progress=False)
    with pytest.raises(ValueError, match=says):
        tools.collect_moments(apply_fn, variables, [X], progress=False)
    with pytest.raises(ValueError, match=says):
        tools.adapt_statistics(apply_fn, variables, X, prior=1)
    is_nnx = isinstance(variables, nnx.Module)
    folded = tools.fold(apply_fn if is_nnx else lambda v, x: apply_fn(v, x)[0], variables, X)
    assert [says in reason for reason in folded.left.values()] == [True]
    if not is_nnx:
        with pytest.raises(ValueError, match=says), tools.frozen_norms():
            apply_fn(variables, X)


def test_a_linen_layer_in_nnx_is_read():
    model = nnx.bridge.ToNNX(bnjax.linen.BatchNorm(use_running_average=True), rngs=nnx.Rngs(0)).lazy_init(X)
    result = tools.recalibrate(called, model, [X], progress=False)
    found = jax.tree.leaves(nnx.state(result, nnx.BatchStat))
    np.testing.assert_allclose(np.concatenate(found), [5, 1], rtol=1e-6)
