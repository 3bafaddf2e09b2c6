"""Tests compositions of up to three transforms of the layer in float32 against the plain formula in float64.

The layer must support every transform that the formula supports, for a batch near zero, where the guard is not taken,
and one far from it. The default run takes some of the pairs, the run in CI all pairs on one device and a sample of the
others; `-m exhaustive` runs all 1,197.
"""

import itertools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import bnjax
from tests.support import naive
from tests.support.cases import assert_close

SCALE, BIAS, EPSILON = np.array([1.0, 2.0, 0.5]), np.array([0.0, 1.0, -1.0]), 1e-5


def _layer(x, axis_name=None):
    scale, bias = (v.astype(x.dtype) for v in (SCALE, BIAS))
    return bnjax.batch_norm(x, scale, bias, axis_name=axis_name)[0]


def _plain(x, axis_name=None):
    return naive.batch_norm(x, SCALE, BIAS, (x.ndim - 1,), EPSILON, None)


def _over_devices(layer):
    """Splits the rows over two devices that share statistics; the plain formula is applied to all rows at once."""
    if layer is _plain:
        return layer
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    return jax.shard_map(lambda x: layer(x, "data"), mesh=mesh, in_specs=P("data"), out_specs=P("data"))


def _over_vmap(layer):
    """Splits the rows over a mapped axis that shares statistics."""
    if layer is _plain:
        return layer
    return lambda x: jax.vmap(lambda x: layer(x, "rows"), axis_name="rows")(x.reshape(2, -1, 3)).reshape(x.shape)


LAYERS = {"": lambda layer: layer, "shard_map": _over_devices, "named vmap": _over_vmap}
TRANSFORMS = {
    "grad": lambda f: jax.grad(lambda x: (f(x) ** 3).sum()),
    "jvp": lambda f: lambda x: jax.jvp(f, (x,), (jnp.cos(x),))[1],
    "vmap": lambda f: lambda x: jax.vmap(f)(jnp.stack([x, 1.5 * x + 1, x - 100])).sum(0),
    "remat": jax.checkpoint,
    "jit": jax.jit,
    "scan": lambda f: lambda x: lax.scan(lambda c, _: (f(c) + 0.1 * c, None), x, None, length=2)[0],
    "jacfwd": lambda f: lambda x: jax.jacfwd(lambda t: f(x + t * jnp.cos(x)))(jnp.full((), 0.3, x.dtype)),
}


def _compositions():
    for where, depth in itertools.product(LAYERS, (1, 2, 3)):
        for names in itertools.product(TRANSFORMS, repeat=depth):
            key = zlib.crc32(" ".join((where, *names)).encode())
            rare = (depth == 3 and key % 48 != 0) or (depth == 2 and where and key % 6 != 0)
            label = " of ".join([*reversed(names), where or "layer"])
            yield pytest.param(where, names, id=label, marks=[pytest.mark.exhaustive] if rare else [])


def _run(layer, where, names, x):
    f = LAYERS[where](layer)
    for name in names:
        f = TRANSFORMS[name](f)
    return f(x)


@pytest.mark.parametrize(("where", "names"), list(_compositions()))
def test_composition(where, names):
    for offset in (0.0, 50.0):
        x = (np.random.default_rng(0).normal(size=(8, 3)) * 2 + offset).astype(np.float32)
        with jax.enable_x64(True):
            want = np.asarray(_run(_plain, "", names, jnp.asarray(x, jnp.float64)))
        got = _run(_layer, where, names, jnp.asarray(x))
        # Rounding, 6e-8 of what is added up, grows through cubes and three derivatives; far from zero the formula's own
        # inner values, such as x + t·cos(x), are rounded in float32 to 50/std as much.
        assert_close(got, want, 5e-4 if not offset else 3e-3, 1e-6 + np.max(np.abs(want)))


@pytest.mark.parametrize("far", [0.0, 50.0])
def test_an_ensemble_sums_no_more_than_its_members(far):
    """Checks that under vmap the guard stays a conditional, because its predicate is one boolean for all members."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 64, 3)) + far, jnp.float32)
    jaxpr = str(jax.make_jaxpr(jax.vmap(lambda x: bnjax.batch_norm(x)[0]))(x))
    assert "cond[" in jaxpr
    want = jnp.stack([bnjax.batch_norm(member)[0] for member in x])
    assert_close(jax.vmap(lambda x: bnjax.batch_norm(x)[0])(x), want, 1e-6)
