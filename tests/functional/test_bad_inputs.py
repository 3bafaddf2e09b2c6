"""Tests bad input: an error that says what must hold, what came and what to write instead; or the right answer.

Runs the tables of bad_inputs.py and bad_calls.py through functional, linen and nnx, in eager mode, under jit and under
eval_shape: the error for a bad argument must be the same in all three.
"""

import contextlib
import dataclasses
import functools
import json
import re
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax
from bnjax import tools
from tests.fixtures import make_bad_inputs_peers as peers
from tests.support.bad_calls import CALLS
from tests.support.bad_input_answers import answer, errors
from tests.support.bad_input_layers import APIS, traced
from tests.support.bad_inputs import CASES, normal

EVERYWHERE = ["eager", "jit", "shape"]
apis = pytest.mark.parametrize("api", APIS)


def outcome(make, case, how, **data):
    """Runs a layer on a case; returns its result or the exception it raised, and the classes of its warnings."""
    with jax.enable_x64(True) if case.x64 else contextlib.nullcontext(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            result = traced(make(case), case.x(), how, **data)
            result = result if how == "shape" else jax.tree.map(np.asarray, result)
        except Exception as error:
            result = error
    return result, {w.category for w in said}


def assert_right(result, said, case):
    assert said == ({bnjax.OneRowWarning} if case.warns else set())
    if isinstance(result, Exception):
        raise result
    want = answer(case)
    if isinstance(result["y"], jax.ShapeDtypeStruct):
        assert {k: v.shape for k, v in result.items()} == {k: v.shape for k, v in want.items()}
    else:
        assert errors(result, want, case) == {}


@apis
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer(case, api):
    if case.error is None:
        for how in (
            EVERYWHERE if api == "functional" else ("eager", "shape")
        ):  # without jit for modules, whose compilation would take minutes
            assert_right(*outcome(APIS[api], case, how), case)
        return
    results = [outcome(APIS[api], case, how) for how in EVERYWHERE]
    for result, _ in results:
        assert isinstance(result, case.error), result
        assert re.search(case.message, str(result)), result
    assert len({(type(result), str(result)) for result, _ in results}) == 1


@apis
@pytest.mark.parametrize("case", [c for c in CASES if c.as_data], ids=str)
def test_values_that_a_trace_cannot_see_give_nan(case, api):
    """Checks, eagerly and traced: y is NaN for an invalid variance or weight, and the running averages stay
    unchanged.
    """
    bad = jnp.asarray(case.mask if case.as_data == "mask" else case.variables["var"])
    good = case if case.as_data == "var" else dataclasses.replace(case, mask=np.where(np.asarray(bad) > 0, 1, 0))
    for how in EVERYWHERE:
        result, said = outcome(APIS[api], case, how, **{case.as_data: bad})
        assert_right(result, said, good)


@pytest.mark.parametrize("how", EVERYWHERE)
@pytest.mark.parametrize("name", CALLS)
def test_call(name, how):
    call, error, message = CALLS[name]
    transform = dict(eager=lambda f: f, jit=jax.jit, shape=lambda f: lambda x: jax.eval_shape(f, x))[how]
    with pytest.raises(error, match=message):
        transform(call)(jnp.ones((4, 5, 3)))


def test_the_table_is_large_and_its_names_are_its_own():
    assert len({c.name for c in CASES}) == len(CASES) >= 200
    assert not {c.name for c in CASES} & set(CALLS)


# One channel and the others -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30], ids=str)
@pytest.mark.parametrize("loc", [0.5, 100.0], ids=["near zero", "far from zero"])
@apis
def test_other_channels_are_the_same_to_the_last_bit(api, loc, bad):
    case = dataclasses.replace(CASES[0], x=normal(64, 3, loc=loc), affine=True)

    def spoiled():
        x = normal(64, 3, loc=loc)()
        x[7, 1] = bad
        return x

    clean, spoilt = (outcome(APIS[api], c, "jit")[0] for c in (case, dataclasses.replace(case, x=spoiled)))
    for name in clean:
        np.testing.assert_array_equal(clean[name][..., [0, 2]], spoilt[name][..., [0, 2]], name)


def test_derivatives_of_other_channels_are_the_same_to_the_last_bit():
    x, h = normal(64, 3, loc=100)(), normal(64, 3)()
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(bnjax.batch_norm(x)[0] * h)))
    bad = x.copy()
    bad[7, 1] = np.nan
    np.testing.assert_array_equal(gradient(x)[:, [0, 2]], gradient(bad)[:, [0, 2]])


@pytest.mark.slow
def test_derivatives_are_numbers_wherever_the_output_is():
    for case in CASES:
        x = case.x() if case.error is None and case.train and not case.x64 else None
        if not isinstance(x, np.ndarray) or x.dtype.kind != "f" or not np.isfinite(answer(case)["y"]).all():
            continue
        run, h = APIS["functional"](case), normal(*x.shape)()
        with warnings.catch_warnings(action="ignore", category=bnjax.OneRowWarning):
            dx = jax.grad(lambda x, run=run, h=h: jnp.sum(run(x)["y"].astype(jnp.float32) * h))(x.astype(np.float32))
        lost = np.zeros(x.shape, bool) if case.mask is None else ~np.isfinite(x)
        assert np.isfinite(np.where(lost, 0, dx)).all(), case


# One row --------------------------------------------------------------------------------------------------------------

ONE = np.ones((1, 3), np.float32)
says_so = pytest.warns(bnjax.OneRowWarning, match=r"\(1, 3\) has 1 row .* more rows.*axis_name.*use_running_average")


@pytest.fixture
def silent():
    with warnings.catch_warnings(action="error"):
        yield


@pytest.mark.usefixtures("silent")
def test_init_and_evaluation_are_silent_about_one_row():
    norm = bnjax.linen.BatchNorm()
    variables = norm.init(jax.random.key(0), ONE, use_running_average=False)
    norm.apply(variables, ONE, use_running_average=True)
    jax.jit(lambda x: norm.init(jax.random.key(0), x, use_running_average=False))(ONE)
    layer = bnjax.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    layer.eval()
    layer(ONE)
    bnjax.batch_moments(ONE)


def test_training_says_so_about_one_row_and_gives_flax_s_output_and_mean():
    """Checks that the running variance stays: one row says nothing about it, and Flax averages its 0."""
    norm, flax_s = bnjax.linen.BatchNorm(use_running_average=False), nn.BatchNorm(use_running_average=False)
    variables = norm.init(jax.random.key(0), ONE)
    with says_so:
        y, updates = norm.apply(variables, ONE, mutable=["batch_stats"])
    y_of_flax, updates_of_flax = flax_s.apply(variables, ONE, mutable=["batch_stats"])
    np.testing.assert_allclose(y, y_of_flax)
    np.testing.assert_allclose(updates["batch_stats"]["mean"], updates_of_flax["batch_stats"]["mean"])
    np.testing.assert_array_equal(updates["batch_stats"]["var"], variables["batch_stats"]["var"])
    with says_so:
        bnjax.nnx.BatchNorm(3, rngs=nnx.Rngs(0))(ONE)
    with says_so:
        jax.eval_shape(bnjax.batch_norm, ONE)


@pytest.mark.usefixtures("silent")
def test_one_row_on_each_of_several_devices_is_no_reason_to_warn():
    x = normal(4, 1, 3)()
    jax.vmap(lambda x: bnjax.batch_norm(x, axis_name="i")[0], axis_name="i")(x)


def test_one_row_on_each_of_several_devices_that_share_nothing():
    with pytest.warns(bnjax.OneRowWarning):
        jax.vmap(lambda x: bnjax.batch_norm(x)[0])(normal(4, 1, 3)())
    with pytest.warns(bnjax.OneRowWarning):
        bnjax.ghost_batch_norm(normal(4, 3)(), virtual_batch_size=1)


# Momentum as data -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("momentum", "mean"), [(0.5, 0.5), (1 + 1e-6, 0.0), (-1e-6, 1.0), (1.5, np.nan), (-1, np.nan)])
def test_a_momentum_that_is_data(momentum, mean):
    """Checks a traced or scheduled momentum: rounding outside of [0, 1] is clipped, and other values give NaN."""
    one = np.ones(2, np.float32)
    running, moments = bnjax.RunningStats(0 * one, one, steps=0 * one), bnjax.Moments(one, one, one)

    def update(m):
        return bnjax.update_running(running, moments, momentum=m).mean

    for got in (update(jnp.float32(momentum)), jax.jit(update)(momentum), update(lambda step: momentum + 0 * step)):
        np.testing.assert_array_equal(got, np.full(2, mean, np.float32))


# Variables that live longer than a call -------------------------------------------------------------------------------


def test_a_checkpoint_in_numpy_s_hands_is_not_written_to():
    mean, layer = np.zeros(3, np.float32), bnjax.nnx.BatchNorm(3, momentum=0.5, rngs=nnx.Rngs(0))
    nnx.update(layer, {"mean": nnx.BatchStat(mean)})
    layer(normal()())
    assert not mean.any()
    assert np.all(layer.mean[...] != 0)


# Variants, tools ------------------------------------------------------------------------------------------------------

VARIANTS = dict(
    GhostBatchNorm=dict(num_virtual_batches=1),
    BatchRenorm=dict(r_max=1.0, d_max=0.0),
    SplitBatchNorm=dict(domain=1, stack=lambda v: np.stack([np.asarray(v)] * 2)),
    PowerNorm={},
    MovingAverageBatchNorm={},
    FrozenBatchNorm={},
)


@pytest.mark.parametrize("api", ["linen", "nnx"])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_refuse_what_batch_norm_refuses(name, api):
    module = getattr(dict(linen=bnjax.linen, nnx=bnjax.nnx)[api], name)
    make = functools.partial(APIS[api], module=module, **VARIANTS[name])
    other = dict(
        FrozenBatchNorm=lambda c: "momentum" in c.name, SplitBatchNorm=lambda c: c.as_data == "var"
    )  # a row: data
    refused = [c for c in CASES if c.error and not other.get(name, lambda c: False)(c)]
    results = {c.name: outcome(make, c, "shape")[0] for c in refused}
    wrong = {c.name: results[c.name] for c in refused if not isinstance(results[c.name], c.error)}
    assert wrong == {}
    unclear = [r for c in refused if not re.search(f"{c.message}|real|per domain", str(r := results[c.name]))]
    assert unclear == []


BROKEN = {"negative": [1.0, -1.0], "NaN": [np.nan, 1.0], "Inf": [np.inf, 1.0]}


@pytest.mark.parametrize("kind", BROKEN)
def test_tools_refuse_broken_variances(kind):
    """Checks that loading, folding and mixing raise; that inspect reports the variances and recalibrate
    replaces them.
    """
    norm, x = bnjax.linen.BatchNorm(use_running_average=True), np.ones((4, 2), np.float32)
    variables = norm.init(jax.random.key(0), x)
    state = {k.removeprefix("bn."): v for k, v in tools.to_torch(variables, names={"": "bn"}).items()}
    state["running_var"] = np.array(BROKEN[kind], np.float32)
    refused = pytest.raises(ValueError, match=r"variances not negative; 1 of 2 channels .* are not: .*recalibrate\(\)")
    with refused:
        tools.from_torch(state, variables)
    variables["batch_stats"]["var"] = jnp.array(BROKEN[kind])
    with refused:
        tools.fold(norm.apply, variables, x)
    with refused:
        tools.adapt_statistics(functools.partial(norm.apply, mutable=["batch_stats"]), variables, x, prior=1)
    assert "1 of 2 channels have statistics that are not finite" in str(tools.inspect(variables))
    mended = tools.recalibrate(functools.partial(norm.apply, mutable=["batch_stats"]), variables, [x], progress=False)
    np.testing.assert_array_equal(mended["batch_stats"]["var"], [0, 0])


def test_tools_refuse_momentum_and_counts_that_are_none():
    stats = {"mean": np.zeros(2, np.float32), "var": np.ones(2, np.float32)}
    moments = {"mean": np.zeros(2, np.float32), "var": np.ones(2, np.float32), "count": np.ones(2, np.float32)}
    with pytest.raises(ValueError, match=r"momentum must be finite and in \[0, 1\]; got 1.5"):
        tools.apply_moments(stats, moments, momentum=1.5)
    with pytest.raises(ValueError, match="one feature shape"):
        tools.apply_moments(stats, moments | {"count": np.float32(3)})
    with pytest.raises(ValueError, match="one feature shape"):
        tools.apply_moments(stats, moments | {"mean": np.zeros(1, np.float32)})
    with pytest.raises(ValueError, match="counts must be 2 non-negative numbers"):
        tools.merge_stats([{"bn": stats}] * 2, counts=[1, np.nan])


# Peers ----------------------------------------------------------------------------------------------------------------


def test_the_page_is_that_of_the_measurements_and_they_are_of_this_table():
    """Checks page and JSON file; to renew them: `KERAS_BACKEND=jax python -m tests.fixtures.make_bad_inputs_peers`."""
    results = json.loads(peers.RESULTS.read_text())
    assert list(results["cases"]) == [c.name for c in CASES]
    assert peers.PAGE.read_text() == peers.page(results)
    ours = {c.name: peers.grade(c, results["cases"][c.name]["bnjax"]) for c in CASES}
    known = {c.name for c in CASES if c.nan and not c.as_data}  # NaN in place of the float64 answer
    assert {name for name, grade in ours.items() if grade != "as it should be"} == known
    assert {ours[name] for name in known} == {"NaN or Inf"}
