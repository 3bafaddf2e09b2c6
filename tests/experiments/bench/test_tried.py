"""Tests that all formulations and all installed libraries in the benchmarks of one layer compute the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench.clock import layers, peers, tried
from tests.support.cases import assert_close, unit

X, DY = (np.random.default_rng(seed).standard_normal((64, 6, 6, 8), np.float32) for seed in (0, 1))
MASKED = "forward + backward, masked"


def _wanted(step, dtype):
    return [np.asarray(v, np.float64) for v in jax.jit(step)(jnp.asarray(X, dtype), jnp.asarray(DY, dtype))[:2]]


FORMULATIONS = [
    (name, dtype)
    for name in sorted(set(tried.TRIED) - {"naive"})
    for dtype in layers.DTYPES
    if dtype == "bfloat16" or name not in tried.ONLY_BFLOAT16
]


@pytest.mark.parametrize(("name", "dtype"), FORMULATIONS)
def test_formulations(name, dtype):
    """Compares each formulation with the naive one; in bfloat16 the tolerance allows rounding twice."""
    with jax.numpy_rank_promotion("allow"):
        found, wanted = (_wanted(tried.TRIED[key][0], dtype) for key in (name, "naive"))
    for own, want in zip(found, wanted, strict=True):
        assert_close(own, want, (100 if dtype == "float32" else 3) * unit(dtype), 1 + np.abs(want))


@pytest.mark.parametrize("name", sorted({*peers.JAX_PEERS} - {*peers.left_out()} - peers.WITHOUT_MASK - {"bnjax"}))
def test_masked_layers(name):
    """Checks that every library that takes a mask gives the results of bnjax with the same mask."""

    def step(peer):
        layer = peers._JAX[peer][1](X.shape, jnp.float32)
        mask = jnp.asarray(np.random.default_rng(2).random((*X.shape[:-1], 1)) < 0.8)
        return lambda x, dy: peers._step(layer, MASKED, layer.params, layer.state, mask, x, dy)

    with jax.numpy_rank_promotion("allow"):
        found, wanted = (_wanted(step(peer), jnp.float32) for peer in (name, "bnjax"))
    epsilon = 1e-3 if name == "keras" else 1e-5  # Keras adds 1e-3 to a variance of 1, the others 1e-5
    for own, want in zip(found, wanted, strict=True):
        assert_close(own, want, 1e-5 + (epsilon - 1e-5), 1 + np.abs(want))


def test_the_table_of_formulations(monkeypatch):
    monkeypatch.setattr(tried, "TRIED", {name: tried.TRIED[name] for name in ("grouped", *tried.ONLY_BFLOAT16)})
    with jax.numpy_rank_promotion("allow"):
        rows = list(tried.measure(tried.Config(quick=True, rounds=1, seconds=0.0)))
    assert [(row["tried"], row["dtype"]) for row in rows] == [
        ("grouped", "float32"),
        *((name, "bfloat16") for name in tried.TRIED),
    ]
    assert all(row["passes"] > 1 for row in rows)
    assert tried.table(rows).count("\n") == 1 + len(tried.TRIED)
