"""Tests that `shuffle` permutes the rows of all devices as one batch, in every mode of JAX, and `unshuffle`
inverts it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax

ROWS, KEY = 32, jax.random.key(3)
X = np.random.default_rng(0).normal(size=(ROWS, 2, 3)).astype(np.float32)


def _shard_map(check_vma=True, shape=(8,), names=("data",)):
    mesh, spec = Mesh(np.array(jax.devices()).reshape(shape), names), P(names)

    def way(function):
        inside = lambda x, key: function(x, key, axis_name=names)  # noqa: E731
        mapped = jax.shard_map(inside, mesh=mesh, in_specs=(spec, P()), out_specs=spec, check_vma=check_vma)
        return lambda x: jax.jit(mapped)(x, KEY)

    return way


def _mapped(transform):
    def way(function):
        def whole(x):
            split = jax.tree.map(lambda a: a.reshape(8, -1, *a.shape[1:]), x)
            out = transform(lambda x: function(x, KEY, axis_name="i"), axis_name="i")(split)
            return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), out)

        return whole

    return way


def _jit(function):
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), P("data"))
    return lambda x: jax.jit(function)(jax.device_put(x, sharding), KEY)


WAYS = {
    "one device": lambda function: lambda x: function(x, KEY),
    "jit": _jit,
    "shard_map": _shard_map(),
    "shard_map, no vma": _shard_map(check_vma=False),
    "shard_map, two axes": _shard_map(shape=(2, 4), names=("a", "b")),
    "pmap": _mapped(jax.pmap),
    "vmap": _mapped(jax.vmap),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_all_ways_are_one_permutation_and_its_inverse(way):
    want = bnjax.shuffle(X, KEY)
    shuffled = way(bnjax.shuffle)(X)
    np.testing.assert_array_equal(shuffled, want)
    np.testing.assert_array_equal(np.sort(shuffled, 0), np.sort(X, 0))
    np.testing.assert_array_equal(way(bnjax.unshuffle)(shuffled), X)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_gradient_goes_back_to_its_row(way):
    h = np.cos(X)
    dx = jax.grad(lambda x: jnp.sum(way(bnjax.shuffle)(x) * h))(jnp.asarray(X))
    np.testing.assert_array_equal(dx, bnjax.unshuffle(h, KEY))


def test_rows_change_their_company():
    """Checks that over many keys two rows of one device stay together as often as by chance, 3 in 31."""
    device = lambda key: bnjax.unshuffle(jnp.arange(ROWS) // 4, key)  # noqa: E731  where each row goes
    places = jax.vmap(device)(jax.random.split(KEY, 4000))
    together = np.mean(places[:, 0] == places[:, 1])
    expected = 3 / 31
    assert abs(together - expected) < 5 * np.sqrt(expected * (1 - expected) / 4000)


def test_trees_are_permuted_alike_and_in_their_dtypes():
    tree = {"x": jnp.arange(8), "mask": jnp.arange(8) % 3 == 0, "wide": jnp.arange(16.0).reshape(8, 2)}
    out = bnjax.shuffle(tree, KEY)
    np.testing.assert_array_equal(out["mask"], out["x"] % 3 == 0)
    np.testing.assert_array_equal(out["wide"][:, 0], 2.0 * out["x"])
    assert out["mask"].dtype == bool


def test_local_statistics_in_other_company():
    """Checks MoCo's key encoder: each row is normalized with the rows shuffled to its device, and is put
    back in place.
    """
    norm = lambda x: bnjax.batch_norm(x)[0]  # noqa: E731
    encode = lambda x, key, axis_name: bnjax.unshuffle(  # noqa: E731
        norm(bnjax.shuffle(x, key, axis_name=axis_name)), key, axis_name=axis_name
    )
    shuffled = np.split(np.asarray(bnjax.shuffle(X, KEY)), 8)
    want = bnjax.unshuffle(np.concatenate([norm(part) for part in shuffled]), KEY)
    np.testing.assert_allclose(_shard_map()(encode)(X), want, rtol=1e-5, atol=1e-6)


def test_what_is_refused():
    with pytest.raises(ValueError, match="one number of rows"):
        bnjax.shuffle((jnp.ones(3), jnp.ones(4)), KEY)
    with pytest.raises(ValueError, match="not an axis"):
        bnjax.shuffle(X, KEY, axis_name="data")
    own = lambda x, key, axis_name: bnjax.shuffle(  # noqa: E731
        x, jax.random.fold_in(key, jax.lax.axis_index(axis_name)), axis_name=axis_name
    )
    with pytest.raises(ValueError, match="pass one key to all"):
        _shard_map()(own)(X)
