"""Tests the optimizers: kernels alone decay, and the learning rate warms up and ends at zero."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnjax.linen import BatchNorm
from bnjax.tools import decay_mask
from experiments.models.convolutional import ConvNet
from experiments.train.devices import data_mesh
from experiments.train.loop import create_state
from experiments.train.optimizer import OPTIMIZERS, warmup_cosine


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_kernels_alone_decay(name: str) -> None:
    """Takes a step without a gradient: AdamW and SGD move kernels by rate times decay, LAMB by the rate."""
    params = {"Dense_0": {"kernel": jnp.ones(3), "bias": jnp.ones(3)}, "BatchNorm_0": {"scale": jnp.ones(3)}}
    optimizer = OPTIMIZERS[name](warmup_cosine(0.1, 10, 0.0), 0.5)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    wanted = {"adamw": 0.05, "sgd": 1.9 * 0.05, "lamb": 0.1}[name]  # Nesterov: the first step counts 1 + 0.9 times
    np.testing.assert_allclose(updates["Dense_0"]["kernel"], -wanted * np.ones(3), rtol=1e-6)
    assert not updates["Dense_0"]["bias"].any()
    assert not updates["BatchNorm_0"]["scale"].any()


def test_schedule_warms_up_and_ends_at_zero() -> None:
    schedule = warmup_cosine(0.2, 100, 0.1)
    assert [float(schedule(step)) for step in (0, 10, 100)] == pytest.approx([0, 0.2, 0])


def test_decay_leaves_scales_and_biases_out() -> None:
    state = create_state(ConvNet(partial(BatchNorm, momentum=0.9), widths=(4, 8)), optax.sgd(0.1), 0, data_mesh(1))
    mask = decay_mask(state.params)
    assert mask["Conv_0"] == {"kernel": True}
    assert mask["BatchNorm_0"] == {"scale": False, "bias": False}
    assert mask["Dense_0"] == {"kernel": True, "bias": False}
