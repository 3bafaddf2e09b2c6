"""Tests every way to split a batch over devices, with every kind of mask, against the float64 oracle."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.support import modes, oracle
from tests.support.cases import SHARDED, assert_close, by_name, expected, tolerance, unit
from tests.support.processes import run_two


def _check(case, got):
    arrays = case.arrays()
    want = expected(case, arrays)
    old = [np.asarray(v) for v in modes.start(case.feature_shape)[:2]]
    running = oracle.update_running(old, want.statistics, modes.MOMENTUM)
    tol, size = tolerance(case), 1 + abs(case.offset)
    terms = np.abs(arrays[3]).sum() / case.feature_shape[-1] * (1 + np.max(np.abs(want.y)))
    assert_close(got["moments.mean"], want.statistics.mean, tol, size, "mean")
    assert_close(got["moments.var"], want.statistics.var, 16 * tol, what="var")
    assert_close(got["moments.count"], want.statistics.count, tol, what="count")
    assert_close(got["running.mean"], running[0], tol, size, "running mean")
    assert_close(got["running.var"], running[1], 16 * tol, what="running var")
    assert_close(got["y"], want.y, tol, what="y")
    assert_close(got["dx"], want.dx, 4 * tol + (unit(case.dtype) if case.dtype != "float32" else 0), what="dx")
    assert_close(got["dscale"], want.dscale, tol, terms, "dscale")
    assert_close(got["dbias"], want.dbias, tol, terms, "dbias")


@pytest.mark.parametrize("case", SHARDED, ids=str)
@pytest.mark.parametrize("mode", modes.MODES)
def test_conformance(mode, case):
    x, scale, bias, dy, mask = case.arrays()
    _check(case, modes.flat(modes.MODES[mode](x, scale, bias, dy, mask, modes.start(scale.shape))))


MESH = {t: jax.make_mesh((4, 2), ("data", "model"), axis_types=(t, t)) for t in (AxisType.Auto, AxisType.Explicit)}


@pytest.mark.parametrize("case", ["plain_shards", "uneven_shards", "nan_in_padding"])
@pytest.mark.parametrize(
    "spec", [P("data"), P("data", None, "model"), P(("data", "model")), P(None, None, "model")], ids=str
)
@pytest.mark.parametrize("axis_type", MESH)
def test_plain_jit_over_any_sharding(axis_type, spec, case):
    """Checks rows, channels or both sharded, with XLA's automatic axes and explicit ones (the default of jax 0.12)."""
    case = by_name(case)
    x, scale, bias, dy, mask = case.arrays()
    with jax.set_mesh(MESH[axis_type]):
        x, dy = (jax.device_put(a, NamedSharding(MESH[axis_type], spec)) for a in (x, dy))
        out = jax.jit(modes.step)(x, scale, bias, dy, mask, modes.start(scale.shape))
    _check(case, modes.flat(out))


@pytest.mark.slow
def test_conformance_of_two_processes(tmp_path):
    """Checks every sharded case on two real processes with four devices each."""
    names = [c.name for c in SHARDED]
    results = run_two(modes.__name__, tmp_path, *names)
    for name in names:
        for result in results:  # both processes hold the same
            _check(by_name(name), {k.split("/")[1]: v for k, v in result.items() if k.startswith(name + "/")})
