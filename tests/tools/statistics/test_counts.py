"""Tests statistics that count batches: under merge, reset, copy, and when moments are applied."""

import jax
import numpy as np
import pytest

import bnjax
from bnjax import tools
from tests.support import cases, zoo


def test_counted_steps():
    """Checks that the counts of plain averages are added by merge, zeroed by reset and copied by copy."""
    norm = bnjax.linen.BatchNorm(use_running_average=False, momentum=None)
    x = jax.random.normal(jax.random.key(0), (4, 8, 3))
    start = norm.init(jax.random.key(1), x[0])

    def after(batches):
        variables = start
        for batch in batches:
            variables = {**variables, **norm.apply(variables, batch, mutable=["batch_stats"])[1]}
        return variables

    parts = [after(x[:1]), after(x[1:])]
    merged = tools.merge_stats(parts, counts=[1, 3])["batch_stats"]
    np.testing.assert_allclose(merged["mean"], np.mean(x, (0, 1)), atol=1e-6)
    np.testing.assert_array_equal(merged["steps"], 4)
    zoo.assert_trees_equal(tools.reset_stats(parts[1]), start)
    zoo.assert_trees_equal(tools.copy_stats(parts[1], start), parts[1])
    assert not any(jax.tree.leaves(tools.decay_mask(parts[1])))


@pytest.mark.parametrize(
    "average",
    [{}, {"momentum": None}, {"momentum": 0.9, "debias": True}, {"momentum": 0.5, "unbiased_var": True}],
    ids=str,
)
def test_moments_applied_are_the_step_of_the_layer(average):
    """Checks that one update from two micro-batches equals a step on all rows, for every kind of average."""
    norm = bnjax.linen.BatchNorm(use_running_average=False, **average)
    x = jax.random.normal(jax.random.key(0), (8, 3)) + 2
    variables = norm.init(jax.random.key(1), x)
    once = norm.apply(variables, x - 1, mutable=["batch_stats"])[1]
    wanted, held = norm.apply({**variables, **once}, x, mutable=["batch_stats"])[1]["batch_stats"], {}
    for part in (x[:3], x[3:]):
        both = {**variables, **once, **held}
        held = norm.apply(both, part, update_stats=False, mutable=["moments"])[1]
    applied = tools.apply_moments(once["batch_stats"], held["moments"], **average)
    assert applied.keys() == wanted.keys()
    for role, value in applied.items():
        cases.assert_close(value, wanted[role], 20 * cases.unit("float32"), 10, role)
