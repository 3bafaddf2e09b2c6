"""The kernels of `bench.compiled.pallas_kernels`, interpreted: value and derivative of `bnjax.batch_norm`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
from experiments.bench.compiled import hlo
from experiments.bench.compiled.pallas_kernels import How, batch_norm
from tests.support.cases import assert_close, unit

CASES = {  # shape, dtype, mean in standard deviations, what the kernels are compiled for
    "one block": ((64, 128), "float32", 0, How(interpret=True)),
    "ReLU inside": ((512, 256), "bfloat16", 2, How(relu=True, interpret=True)),
    "neither whole chunks of rows nor whole blocks of channels": ((300, 200), "float32", 1000, How(interpret=True)),
    "backward kernel alone": ((512, 256), "bfloat16", 2, How(relu=True, forward=False, interpret=True)),
}


def _arrays(shape, dtype, offset):
    rng = np.random.default_rng(0)
    x, h = (jnp.asarray(rng.normal(size=shape) + mean, dtype) for mean in (offset, 0))
    scale, bias = (jnp.asarray(rng.normal(size=shape[1:]), jnp.float32) for _ in range(2))
    return x, scale, bias, h


@pytest.mark.parametrize("case", CASES)
def test_the_kernels_are_batch_norm(case):
    shape, dtype, offset, how = CASES[case]
    x, scale, bias, h = _arrays(shape, dtype, offset)

    def library(x, scale, bias):
        y, moments = bnjax.batch_norm(x, scale, bias, dtype=dtype, activation=jax.nn.relu if how.relu else None)
        return y, moments.mean, moments.var

    def value_and_derivative(f, *args):
        (y, *moments), pullback = jax.vjp(f, *args)
        return y, *moments, *pullback((h, *map(jnp.zeros_like, moments)))

    both = jax.jit(lambda *args: [value_and_derivative(f, *args) for f in (partial(batch_norm, how), library)])

    coarse = 4 * unit(dtype) + 64 * unit("float32") * (1 + offset / 16)
    for name, got, want in zip(("y", "mean", "var", "dx", "dscale", "dbias"), *both(x, scale, bias), strict=True):
        assert got.dtype == want.dtype
        assert_close(got, want, coarse, 1 + np.max(np.abs(np.asarray(want, np.float64))), name)


def test_a_transfer_that_begins_counts_what_it_moves():
    """Of a slice no more than the slice, and nothing that is written on chip."""
    text = """
ENTRY %main (w: f32[64,8]) -> f32[64,8] {
  %w = f32[64,8]{1,0:T(8,128)} parameter(0)
  %slice-start = ((f32[64,8]{1,0:T(8,128)}), f32[16,8]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%w)
  %slice-done = f32[16,8]{1,0:T(8,128)S(1)} slice-done(%slice-start)
  %copy-start = (f32[64,8]{1,0:T(8,128)}, f32[64,8]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%w)
  ROOT %copy-done = f32[64,8]{1,0:T(8,128)} copy-done(%copy-start)
}
"""
    assert hlo.traffic(text) == ((16 + 64 + 64) * 8 * 4, 0)
