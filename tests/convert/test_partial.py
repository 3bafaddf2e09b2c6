"""Tests loading into a network with another head: what is kept is reported, and everything else must fit."""

import jax
import numpy as np
import pytest

from tests.convert.libraries import LIBRARIES, each_library, network
from tests.support import zoo


@each_library
def test_partial(library):
    """Checks that kept modules are reported, all others must fit, and no module is filled in part."""
    given, to, separator = LIBRARIES[library]
    variables, blank = network()
    state = to(variables)
    weight, bias = (f"Dense_0{separator}{w}" for w in ("weight" if library == "torch" else "kernel", "bias"))
    head = blank["params"]["Dense_0"]
    others = {k: v for k, v in state.items() if k not in (weight, bias)}
    cases = [
        (
            {**others, weight: np.ones((9, 6) if library == "torch" else (6, 9)), bias: np.ones(9)},
            weight,
            {weight, bias},
        ),
        ({**others, weight: state[weight], bias: np.ones(9)}, bias, {weight, bias}),
        (others, weight, set()),
        ({**others, f"other{separator}bias": np.ones(9)}, weight, {f"other{separator}bias"}),
    ]
    for held, culprit, unused in cases:
        with pytest.raises(ValueError, match=r"partial=\['Dense_0'\]|partial=\[\.\.\.\]|state lacks"):
            given(held, blank)
        for patterns in (["Dense_0"], ["*Dense*"], ["*"]):
            loaded = given(held, blank, partial=patterns)
            assert set(loaded.kept) == {"Dense_0"} and culprit.rpartition(separator)[2] in "weight kernel bias"
            assert "Dense_0" in loaded.kept["Dense_0"]
            assert set(loaded.unused) == unused
            assert loaded.variables["params"]["Dense_0"].keys() == head.keys()
            zoo.assert_trees_equal(loaded.variables["params"]["Dense_0"], head)
            zoo.assert_trees_equal(loaded.variables["batch_stats"], variables["batch_stats"])
    whole = given(state, blank, partial=["Dense_0"])
    assert (whole.kept, whole.unused) == ({}, ())
    zoo.assert_trees_equal(whole.variables, variables)


@each_library
def test_partial_that_cannot_be(library):
    given, to, separator = LIBRARIES[library]
    variables, blank = network()
    state = to(variables)
    for partial, message in [
        (["head"], r"partial: 'head' fits no module"),
        ("Dense_0", r"write \['Dense_0'\]"),
        (["*"], "nothing in state fits"),
    ]:
        with pytest.raises(ValueError, match=message):
            given(
                {f"x{separator}{k}": v for k, v in state.items()} if partial == ["*"] else state, blank, partial=partial
            )
    lacking = {k: v for k, v in state.items() if not k.startswith("Conv_0")}
    with pytest.raises(ValueError, match=r"lacks \['Conv_0"):
        given(lacking, blank, partial=["Dense_0"])
    shapes = jax.eval_shape(lambda v: v, blank)
    without = {k: v for k, v in state.items() if not k.startswith("Dense_0")}
    with pytest.raises(ValueError, match=r"Dense_0/bias gets no value from state"):
        given(without, shapes, partial=["Dense_0"])
