"""Tests drawn combinations of dtype, rank, axis, mask, epsilon and momentum, for every function and module.

If a combination makes sense, by the definition in this file, the result must be the float64 answer. If not, bnjax
itself must raise a `ValueError` or `TypeError`; an error from inside JAX or NumPy fails the test.
"""

import dataclasses
import math
import traceback
import warnings
from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bnjax
from tests.support import oracle
from tests.support.bad_input_answers import answer, errors
from tests.support.bad_input_layers import APIS, linen, nnx_module, traced
from tests.support.bad_inputs import BF16, F8, Case

sweep = partial(settings, deadline=None, derandomize=True, database=None)
# Valid values are listed several times, so that many draws are valid and some are not.
EPSILONS = [1e-5, 1e-3, 0.5] * 3 + [0.0, -1.0, math.nan, math.inf, 1e-60, "1e-5", None]
MOMENTA = [0.9, 0.0, 1] * 4 + [1.5, -0.1, math.nan, "0.9"]
DTYPES = [np.float32, np.float16, BF16, F8, np.float64, np.int8, np.uint8, np.int32, bool, np.complex64]
MASKS = [bool, np.int8, np.float32, np.float16, np.complex64]


@st.composite
def cases(draw):
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    rank = len(shape)
    some = st.integers(-rank, rank - 1) if rank else st.integers(-1, 0)
    axis = draw(st.one_of(some, some, some, st.lists(some, max_size=2).map(tuple), st.integers(-6, 6), st.just("C")))
    features = _features(shape, axis)
    anything = st.lists(st.integers(0, 4), max_size=2).map(tuple)
    channels = draw(anything) if features is None or draw(st.integers(0, 4)) == 0 else features
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99))
    return Case(
        "drawn",
        partial(_drawn, shape, dtype, seed),
        train=draw(st.booleans()),
        axis=axis,
        epsilon=draw(st.sampled_from(EPSILONS)),
        momentum=draw(st.sampled_from(MOMENTA)),
        mask=draw(st.one_of(st.none(), masks(shape))),
        channels=channels,
        affine=draw(st.booleans()),
    )


@st.composite
def masks(draw, shape):
    fitting = tuple(draw(st.sampled_from([1, n])) for n in shape)[draw(st.integers(0, 1)) :]
    shape = draw(st.one_of(*[st.just(fitting)] * 3, st.lists(st.integers(1, 4), max_size=4).map(tuple)))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    return rng.integers(draw(st.sampled_from([0, 0, 0, -1])), 3, shape).astype(draw(st.sampled_from(MASKS)))


def _drawn(shape, dtype, seed):
    x = np.random.default_rng(seed).normal(1, 3, shape)
    return (x * (1 + 1j) if dtype is np.complex64 else x).astype(dtype)


def _features(shape, axis):
    """Returns the feature shape, or None if the axis does not fit."""
    axes = (axis,) if isinstance(axis, int) else axis
    fits = isinstance(axes, tuple) and axes and all(-len(shape) <= a < len(shape) for a in axes)
    if not fits or len({a % len(shape) for a in axes}) < len(axes):
        return None
    return tuple(shape[a] for a in sorted(a % len(shape) for a in axes))


def makes_sense(case):
    """Returns True if the arguments of a case fit together."""
    x = case.x()
    if _features(x.shape, case.axis) != case.channels:
        return False
    if not isinstance(case.epsilon, float) or not 1e-25 < case.epsilon < math.inf:
        return False
    if case.train and (isinstance(case.momentum, str) or not 0 <= case.momentum <= 1):
        return False
    mask = case.mask
    if mask is None:
        return True
    padded = (1,) * (x.ndim - mask.ndim) + mask.shape
    fits = len(padded) == x.ndim and all(m in (1, n) for m, n in zip(padded, x.shape, strict=True))
    return fits and mask.dtype.kind != "c" and bool(np.all(mask >= 0))


def attempt(call):
    """Calls a function, and returns its result or the exception it raised."""
    with warnings.catch_warnings(action="ignore", category=bnjax.OneRowWarning):
        try:
            return call()
        except Exception as error:
            return error


def assert_said_by_bnjax(error, what):
    assert isinstance(error, ValueError | TypeError), (what, error)
    raised = traceback.extract_tb(error.__traceback__)[-1].filename
    assert "/bnjax/" in raised, f"{what}: {error!r} was raised in {raised}"
    assert not isinstance(error, jax.errors.JAXTypeError), (what, error)


def check(case, layer, *, like=None, is_valued=True):
    """Checks a layer on a case; `like` is the case whose answer is expected, if not this one's."""
    runs = [attempt(lambda how=how: traced(layer(case), case.x(), how)) for how in ("eager", "shape")]
    if not makes_sense(case):
        for result in runs:
            assert_said_by_bnjax(result, case)
        assert str(runs[0]) == str(runs[1])
        return
    result, shapes = runs
    if isinstance(result, Exception):
        raise result
    assert jax.tree.map(np.shape, result) == jax.tree.map(lambda s: s.shape, shapes)
    if is_valued:
        assert errors(jax.tree.map(np.asarray, result), answer(like or case), like or case) == {}, case
    else:
        assert result["y"].shape == case.x().shape


@pytest.mark.slow
@pytest.mark.parametrize("api", APIS)
@given(case=cases())
@sweep(max_examples=100)
def test_batch_norm(api, case):
    check(case, APIS[api])


# Variants with options under which they equal batch normalization, and two that never do, whose errors are tested.
PLAIN = dict(
    GhostBatchNorm=dict(num_virtual_batches=1),
    BatchRenorm=dict(r_max=1.0, d_max=0.0),
    SplitBatchNorm=dict(domain=1, stack=lambda v: np.stack([0 * np.asarray(v), v])),
)
OTHERS = dict(PowerNorm={}, MovingAverageBatchNorm=dict(debias=False))
KINDS = dict(linen=(bnjax.linen, linen), nnx=(bnjax.nnx, nnx_module))


def _of_domain_1(layer, case):
    """Returns a layer whose running averages are those of domain 1."""

    def run(x):
        result = layer(case)(x)
        return result | {k: result[k][1] for k in ("mean", "var")}

    return run


@pytest.mark.parametrize("api", KINDS)
@pytest.mark.parametrize("name", [*PLAIN, *OTHERS])
@given(case=cases())
@sweep(max_examples=25)
def test_variants(name, api, case):
    if np.iscomplexobj(case.x()) and name in ("BatchRenorm", *OTHERS):
        return
    if name == "GhostBatchNorm" and len(case.channels) == case.x().ndim:  # no axis to cut
        return
    modules, layer = KINDS[api]
    layer = partial(layer, module=getattr(modules, name), **(PLAIN | OTHERS)[name])
    check(case, partial(_of_domain_1, layer) if name == "SplitBatchNorm" else layer, is_valued=name in PLAIN)


@pytest.mark.parametrize("api", KINDS)
@given(case=cases())
@sweep(max_examples=25)
def test_frozen(api, case):
    """Checks FrozenBatchNorm, which ignores the momentum."""
    case = dataclasses.replace(case, train=True, momentum=0.9)
    modules, layer = KINDS[api]
    check(case, partial(layer, module=modules.FrozenBatchNorm), like=dataclasses.replace(case, train=False, mask=None))


# Statistics as values -------------------------------------------------------------------------------------------------

shapes = st.sampled_from([(3,)] * 4 + [(1,), (), (4,), (3, 1), (2, 3)])


def _values(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.uniform(0.1, 2, shape).astype(np.float32) for shape in shapes]


@given(st.tuples(*[shapes] * 5), st.sampled_from(MOMENTA), st.integers(0, 99))
@sweep(max_examples=60)
def test_update_running(five, momentum, seed):
    *running, mean, var, count = _values(seed, *five)
    stats = bnjax.Moments(mean, var, count)
    result = attempt(lambda: bnjax.update_running(bnjax.RunningStats(*running), stats, momentum=momentum))
    if len(set(five)) > 1 or isinstance(momentum, str) or not 0 <= momentum <= 1:
        assert_said_by_bnjax(result, (five, momentum))
        return
    want = oracle.update_running(running, oracle.Statistics(*(v.astype(np.float64) for v in stats)), momentum)
    np.testing.assert_allclose(result[:2], want, rtol=1e-6)


@given(st.tuples(*[shapes] * 6), st.integers(0, 99))
@sweep(max_examples=60)
def test_merge_moments(six, seed):
    values = _values(seed, *six)
    parts = [bnjax.Moments(*values[:3]), bnjax.Moments(*values[3:])]
    result = attempt(lambda: bnjax.merge_moments(*parts))
    if len(set(six)) > 1:
        assert_said_by_bnjax(result, six)
        return
    (m, v, n), (other_m, other_v, other_n) = (tuple(a.astype(np.float64) for a in p) for p in parts)
    mean = (n * m + other_n * other_m) / (n + other_n)
    var = (n * (v + (m - mean) ** 2) + other_n * (other_v + (other_m - mean) ** 2)) / (n + other_n)
    for got, want in zip(result, (mean, var, n + other_n), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)
