"""Complex inputs: refused with what to write instead, and what the page in docs/ writes is what Flax computes."""

import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import bnjax
import hlo
from cases import assert_close

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "complex.md"
ROWS, CHANNELS = 32, 3
V = jnp.ones(CHANNELS)
REFUSED = {
    "batch_norm": bnjax.batch_norm,
    "batch_moments": bnjax.batch_moments,
    "normalize": lambda x: bnjax.normalize(x, V, V),
    "power_norm": lambda x: bnjax.power_norm(x, V),
    "moving_average_batch_norm": lambda x: bnjax.moving_average_batch_norm(x, V),
    "linen": lambda x: bnjax.linen.BatchNorm(use_running_average=False).init(jax.random.key(0), x),
    "nnx": lambda x: bnjax.nnx.BatchNorm(CHANNELS, rngs=nnx.Rngs(0))(x),
}


@pytest.mark.parametrize("function", REFUSED.values(), ids=REFUSED)
def test_refused(function):
    with pytest.raises(TypeError, match=r"x must be real; got dtype complex64\. Normalise x\.real and x\.imag"):
        function(jnp.ones((4, CHANNELS), jnp.complex64))


@pytest.fixture
def complex_batch_norm():
    names = {}
    exec(compile(re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)[0], PAGE.name, "exec"), names)
    return names["complex_batch_norm"]


def _draw():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape) + 1j * rng.normal(size=shape)  # noqa: E731
    x = draw(ROWS, CHANNELS) * 2 + 3 - 1j
    return x, draw(CHANNELS), draw(CHANNELS), draw(ROWS, CHANNELS), rng.random((ROWS, 1)) < 0.7


def test_the_page_is_flax(complex_batch_norm):
    """Value, statistics and the gradients of Re Σ y·h, in float64."""
    with jax.enable_x64(True):
        x, scale, bias, h, mask = map(jnp.asarray, _draw())
        flax = nn.BatchNorm(use_running_average=False, momentum=0.0, param_dtype=x.dtype)
        start = dict(mean=jnp.zeros(CHANNELS, x.dtype), var=jnp.ones(CHANNELS))

        def theirs(x, scale, bias):
            variables = dict(params=dict(scale=scale, bias=bias), batch_stats=start)
            y, updates = flax.apply(variables, x, mask=mask, mutable=["batch_stats"])
            return y, updates["batch_stats"]["mean"], updates["batch_stats"]["var"]

        def ours(x, scale, bias):
            return complex_batch_norm(x, scale, bias, mask=mask)

        def derivatives(f):
            return jax.jit(jax.grad(lambda *a: jnp.sum(f(*a)[0] * h).real, (0, 1, 2)))(x, scale, bias)

        pairs = ((ours(x, scale, bias), theirs(x, scale, bias)), (derivatives(ours), derivatives(theirs)))
        for mine, flaxs in pairs:
            for a, b in zip(mine, flaxs, strict=True):
                for part in (jnp.real, jnp.imag):
                    assert_close(part(a), part(b), 1e-9, 1 + np.max(np.abs(b)))


def test_the_page_shares_statistics_between_devices(complex_batch_norm):
    x = jnp.asarray(_draw()[0], jnp.complex64)
    mesh, data = Mesh(np.array(jax.devices()), ("data",)), P("data")
    inside = lambda x: complex_batch_norm(x, axis_name="data")[0]  # noqa: E731
    mapped = jax.jit(jax.shard_map(inside, mesh=mesh, in_specs=data, out_specs=data))
    np.testing.assert_allclose(mapped(x), complex_batch_norm(x)[0], rtol=1e-5, atol=1e-5)
    main, _ = hlo.all_reduces(mapped.lower(x).compile())
    assert len(main) == 1
