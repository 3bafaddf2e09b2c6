"""Tests that a layer without a mean takes no state of a layer that subtracts one."""

import jax
import numpy as np
import pytest
from flax import nnx

import bnjax
from bnjax import tools
from bnjax.functional._protocol import AboutZero

X = np.ones((4, 2), np.float32)
STATE = {
    "weight": np.ones(2, np.float32),
    "bias": np.zeros(2, np.float32),
    "running_mean": np.zeros(2, np.float32),
    "running_var": np.ones(2, np.float32),
}


class LinenNorm(AboutZero, bnjax.linen.BatchNorm):
    """Divides by the root mean square in evaluation, as far as its running mean is 0."""


class NnxNorm(AboutZero, bnjax.nnx.BatchNorm):
    """Is `LinenNorm` for nnx."""


def _linen():
    norm = LinenNorm(use_running_average=True)
    return norm.init(jax.random.key(0), X), dict(apply_fn=norm.apply, x=X)


def _nnx():
    return NnxNorm(2, rngs=nnx.Rngs(0)), {}


@pytest.mark.parametrize("make", [_linen, _nnx])
def test_means_that_nothing_would_subtract_are_refused(make):
    variables, options = make()
    tools.from_torch(STATE, variables, **options)
    with pytest.raises(
        ValueError, match=r"running_mean holds means that are not 0, and .* is a layer that subtracts none"
    ):
        tools.from_torch(STATE | {"running_mean": np.array([0, 0.5], np.float32)}, variables, **options)
