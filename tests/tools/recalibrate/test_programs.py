"""Tests the programs that recalibrate runs: one for a function and shapes, shown as it goes, with plain errors."""

import functools
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax
from bnjax import tools
from tests.support import zoo

ROWS = jax.random.normal(jax.random.key(0), (8, 3))


def linen_fn(model, **options):
    return functools.partial(model.apply, mutable=["batch_stats"], **options)


def norm(**fields):
    return bnjax.linen.BatchNorm(use_running_average=True, **fields)


class Counter:
    """Counts how often a model was traced."""

    traces = 0


def traced(make, variables, calls=3):
    """Returns how often a model was traced by each of some calls of two tools, whose function is `make(counter)`."""
    counter, found = Counter(), []
    for _ in range(calls):
        before = counter.traces
        tools.recalibrate(make(counter), variables, [ROWS, ROWS], progress=False)
        tools.collect_moments(make(counter), variables, [ROWS], progress=False)
        found.append(counter.traces - before)
    return found


MODEL = norm()


def counted(counter, variables, x):
    counter.traces += 1
    return MODEL.apply(variables, x, mutable=["batch_stats"])


class Owner:
    """An object with a method, equal to others of its name."""

    def __init__(self, name, counter):
        self.name, self.counter = name, counter

    def __hash__(self):
        return hash(self.name)

    def __eq__(self, other):
        return self.name == other.name

    def run(self, variables, x):
        return counted(self.counter, variables, x)


SAME = {  # functions that are made anew for every call, and are the same
    "partial": lambda counter: functools.partial(counted, counter),
    "lambda": lambda counter: lambda variables, x: counted(counter, variables, x),
    "default": lambda counter: lambda variables, x, counter=counter: counted(counter, variables, x),
    "method": lambda counter: Owner("one", counter).run,
    "partial_of_lambda": lambda counter: functools.partial(lambda c, variables, x: counted(c, variables, x), counter),
}


@pytest.mark.parametrize("name", SAME)
def test_one_program_for_a_function_and_shapes(name):
    variables = MODEL.init(jax.random.key(0), ROWS)
    first, *others = traced(SAME[name], variables)
    assert first <= 2  # the two tools ask for one program
    assert others == [0, 0]


def test_other_functions_and_values_around_them_are_other_programs():
    variables = MODEL.init(jax.random.key(0), ROWS)
    for shift in (0.0, 1.0):
        apply_fn = lambda v, x: MODEL.apply(v, x + shift, mutable=["batch_stats"])  # noqa: B023, E731
        found = tools.recalibrate(apply_fn, variables, [ROWS], progress=False)
        np.testing.assert_allclose(found["batch_stats"]["mean"], ROWS.mean(0) + shift, atol=1e-6)


def test_a_global_that_changed_is_another_program():
    """Checks a cell of a notebook that runs again after a global changed, directly and through a helper."""
    variables, source = MODEL.init(jax.random.key(0), ROWS), "apply_fn = lambda v, x: shifted(v, x)"
    helper = "shifted = lambda v, x: MODEL.apply(v, x + shift, mutable=['batch_stats'])"
    cell = {"MODEL": MODEL}
    exec(helper, cell)
    for shift in (0.0, 1.0):
        cell["shift"] = shift
        exec(source, cell)
        found = tools.recalibrate(cell["apply_fn"], variables, [ROWS], progress=False)
        np.testing.assert_allclose(found["batch_stats"]["mean"], ROWS.mean(0) + shift, atol=1e-6)


def test_nnx_modules_of_one_structure_share_a_program():
    counter, found = Counter(), []

    def apply_fn(model, x):
        counter.traces += 1
        return model(x)

    for seed in range(3):
        model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(seed)), bnjax.nnx.BatchNorm(4, rngs=nnx.Rngs(seed)))
        tools.recalibrate(apply_fn, model, [ROWS], progress=False)
        found.append(counter.traces)
    assert found == [found[0]] * 3


def test_nothing_is_kept_of_a_call():
    """Checks that calls with functions that are all different leave no arrays behind."""
    variables = MODEL.init(jax.random.key(0), ROWS)

    def call(shift):
        tools.recalibrate(
            lambda v, x: MODEL.apply(v, x + shift, mutable=["batch_stats"]), variables, [ROWS], progress=False
        )

    for shift in range(9):  # more than there is room for
        call(float(shift))
    before = len(jax.live_arrays())
    for shift in range(9, 12):
        call(float(shift))
    assert len(jax.live_arrays()) <= before


def two_norms():
    model = nn.Sequential([norm(), norm()])
    return linen_fn(model), model.init(jax.random.key(0), ROWS)


def test_jitted_before_and_after():
    """Checks that a function that jit has traced is recalibrated, and works unchanged afterwards."""
    apply_fn, variables = two_norms()
    jitted = jax.jit(apply_fn)
    before = jitted(variables, ROWS)
    found, wanted = (tools.recalibrate(f, variables, [ROWS], progress=False) for f in (jitted, apply_fn))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, wanted)
    zoo.assert_trees_equal(jitted(variables, ROWS), before)


def test_progress(capsys):
    apply_fn, variables = two_norms()
    done = []
    tools.recalibrate(apply_fn, variables, [ROWS] * 4, progress=done.append)
    assert done == [1, 2, 3, 4]
    tools.recalibrate(apply_fn, variables, iter([ROWS]), progress=False)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("bar", [True, False])
def test_what_is_shown_names_the_layer(bar, capsys, monkeypatch):
    """Checks the bars, and the lines where tqdm is not installed: which layer, and how many are left."""
    apply_fn, variables = two_norms()
    if bar:
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    else:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    tools.recalibrate(apply_fn, variables, [ROWS] * 3, layerwise=True)
    tools.recalibrate(apply_fn, variables, [ROWS] * 3)
    out, shown = capsys.readouterr()
    assert out == ""
    for label in ("layers_0 (1 of 2)", "layers_1 (2 of 2)", "recalibrate"):
        assert f"{label}: " in shown
    assert ("3/3" if bar else "3 batches in") in shown


class OwnNorm(nn.Module):
    """A user's own normalization, which does not say what it computes."""

    @nn.compact
    def __call__(self, x):
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:])
        var = self.variable("batch_stats", "var", jnp.ones, x.shape[-1:])
        return bnjax.normalize(x, mean.value, var.value)


class Unused(nn.Module):
    """A network with a layer that runs in `init` alone."""

    @nn.compact
    def __call__(self, x):
        return norm()(x) if self.is_initializing() else x


def test_errors():
    apply_fn, variables = two_norms()
    data = [ROWS, ROWS]
    own, unused = OwnNorm(), Unused()
    cases = [
        ("batches is empty", apply_fn, variables, [], {}),
        ("batches is empty", apply_fn, variables, [], {"layerwise": True}),
        ("not an iterator", apply_fn, variables, iter(data), {"layerwise": True}),
        ("'BatchNrom' fits no layer", apply_fn, variables, data, {"layers": ["BatchNrom"]}),
        ("layers is empty, so no layer is named", apply_fn, variables, data, {"layers": []}),
        ("layers is empty, so no layer is named", apply_fn, variables, data, {"layers": (), "layerwise": True}),
        (r"mutable=\['batch_stats'\]", nn.Sequential([norm(), norm()]).apply, variables, data, {}),
        (r"must return \(output, updates\)", lambda v, x: apply_fn(v, x)[1], variables, data, {}),
        ("holds no batch normalization", apply_fn, {"params": variables["params"]}, data, {}),
        ("OwnNorm holds a running mean .* does not say", linen_fn(own), own.init(jax.random.key(0), ROWS), data, {}),
        ("ran no batch normalization", linen_fn(unused), unused.init(jax.random.key(0), ROWS), data, {}),
    ]
    for message, function, tree, batches, options in cases:
        with pytest.raises(ValueError, match=message):
            tools.recalibrate(function, tree, batches, progress=False, **options)
