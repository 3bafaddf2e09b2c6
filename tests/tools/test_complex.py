"""Tests the tools on layers of complex inputs, which have a complex mean and a real variance."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
from bnjax import tools
from tests.support import cases

TOLERANCE = 100 * cases.unit("float32")


def network(*layers):
    """Builds a network of complex weights, with statistics that differ from their initial values."""
    model, x = nn.Sequential(layers), jax.random.normal(jax.random.key(0), (20, 3), jnp.complex64) + (2 - 1j)
    return model, jax.tree.map(moved, model.init(jax.random.key(1), x)), x


def moved(leaf):
    """Changes every channel by another amount; real values stay positive."""
    by = 0.2 * jnp.arange(1.0, leaf.size + 1).reshape(leaf.shape) / leaf.size
    return leaf + by * (1 - 2j) if jnp.iscomplexobj(leaf) else leaf + by


def dtypes(tree):
    """Returns the dtypes of the leaves."""
    return jax.tree.map(jnp.result_type, tree)


Norm = functools.partial(bnjax.linen.BatchNorm, use_running_average=True)
Dense = functools.partial(nn.Dense, 4, param_dtype=jnp.complex64)


def test_population_and_its_table():
    model, variables, x = network(Norm())
    apply_fn = functools.partial(model.apply, mutable=["batch_stats"])
    result = tools.recalibrate(apply_fn, variables, [x[:12], x[12:]], progress=False)
    wide = np.asarray(x, np.complex128)
    stats = result["batch_stats"]["layers_0"]
    np.testing.assert_allclose(stats["mean"], wide.mean(0), rtol=TOLERANCE)
    np.testing.assert_allclose(stats["var"], wide.var(0), rtol=TOLERANCE)
    (row,) = tools.inspect(result, tools.collect_moments(apply_fn, result, [x], progress=False)).rows
    assert max(row["mean_drift"], row["var_drift"]) < 1e-4
    assert row["mean_over_std"] == pytest.approx(np.max(np.abs(wide.mean(0)) / wide.std(0)), rel=1e-4)


def test_a_teacher_follows_complex_statistics():
    _, variables, _ = network(Norm())
    student = tools.reset_stats(variables)
    followed = tools.follow(variables, student, momentum=0.75)
    mean = variables["batch_stats"]["layers_0"]["mean"]
    np.testing.assert_allclose(followed["batch_stats"]["layers_0"]["mean"], 0.75 * mean, rtol=1e-6)


@pytest.mark.parametrize("layers", ["previous", "previous_no_bias", "next"])
def test_folding(layers):
    """Checks that a complex shift left in the normalization goes into the mean, because the bias is real."""
    made = {
        "previous": [Dense(), Norm()],
        "previous_no_bias": [Dense(use_bias=False), Norm()],
        "next": [Norm(), Dense()],
    }
    model, variables, x = network(*made[layers])
    folded, y = tools.fold(model.apply, variables, x), model.apply(variables, x)
    assert len(folded.pairs) == 1
    for other in (model.apply(folded.variables, x), folded.apply_fn(folded.stripped, x)):
        np.testing.assert_allclose(other, y, atol=1e-5 * np.abs(y).max(), rtol=0)
    assert dtypes(folded.variables) == dtypes(variables)


def test_reset_merge_and_copies_keep_the_dtypes():
    _, variables, _ = network(Norm())
    for result in (
        tools.reset_stats(variables),
        tools.merge_stats([variables, variables]),
        tools.copy_stats(variables, variables),
    ):
        assert dtypes(result) == dtypes(variables)
    merged = tools.merge_stats([variables, variables])["batch_stats"]["layers_0"]
    np.testing.assert_allclose(merged["mean"], variables["batch_stats"]["layers_0"]["mean"], rtol=1e-6)
    np.testing.assert_allclose(merged["var"], variables["batch_stats"]["layers_0"]["var"], rtol=1e-6)
