"""Tests for one all-reduce forward and one backward in the compiled program, and the errors for axis names.

The guard of `batch_moments` has one more all-reduce, in a branch that training rarely takes. Under plain jit on the CPU
the sums are in branches too, one of which runs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax
from experiments.bench.compiled import hlo
from tests.support.cases import assert_close, by_name, expected, tolerance

CHANNELS = 4
MESH = Mesh(np.array(jax.devices()), ("data",))
MASKS = {"no mask": None, "mask": jnp.ones((32, 1, 1), bool)}


def _loss(x, scale, bias, mask, axis_name):
    y, _ = bnjax.batch_norm(x, scale, bias, mask=mask, axis_name=axis_name)
    return jnp.sum(jnp.sin(y))


PROGRAMS = {
    "forward": (lambda *a: bnjax.batch_norm(*a[:3], mask=a[3], axis_name=a[4])[0], P("data")),
    "gradient of x": (jax.grad(_loss), P("data")),
    "gradient of all": (jax.grad(_loss, (0, 1, 2)), (P("data"), P(), P())),
}


def _compile(program, mask, check_vma):
    f, out_specs = PROGRAMS[program]
    mapped = jax.shard_map(
        lambda *a: f(*a, "data"),
        mesh=MESH,
        in_specs=(P("data"), P(), P(), None if mask is None else P("data")),
        out_specs=out_specs,
        check_vma=check_vma,
    )
    x, vector = jnp.ones((32, 3, CHANNELS)), jnp.ones(CHANNELS)
    return jax.jit(mapped).lower(x, vector, vector, mask).compile()


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize(
    ("program", "check_vma", "count"),
    [
        ("forward", True, 1),
        ("forward", False, 1),
        ("gradient of x", True, 2),
        ("gradient of x", False, 2),
        ("gradient of all", True, 2),  # also sums the gradients of scale and bias over devices
    ],
)
def test_one_all_reduce_each_way(program, check_vma, count, mask):
    main, rare = hlo.all_reduces(_compile(program, mask, check_vma))
    assert len(main) == count, main
    assert all(hlo.elements(payload) <= 3 * CHANNELS for payload in main), main
    assert [len(v) for v in rare.values()] == [1], rare  # the guard's


def test_plain_jit_combines_too():
    """Checks XLA's own all-reduces: at most one per direction in the main program, and one in any branch."""
    x, vector = jnp.ones((32, 3, CHANNELS)), jnp.ones(CHANNELS)
    gradient = jax.jit(
        lambda *a: PROGRAMS["gradient of all"][0](*a, None, None),
        in_shardings=(NamedSharding(MESH, P("data")), None, None),
    )
    main, rare = hlo.all_reduces(gradient.lower(x, vector, vector).compile())
    assert len(main) <= 2
    assert all(len(v) == 1 for v in rare.values()), rare


# Groups --------------------------------------------------------------------------------------------------------------

GROUPS = [[0, 1, 2, 3], [4, 5, 6, 7]]


def _halves(case):
    """Returns y and dx when each half of the batch is normalized by itself."""
    x, scale, bias, dy, mask = case.arrays()
    half = len(x) // 2
    parts = [(x[s], scale, bias, dy[s], None if mask is None else mask[s]) for s in (slice(half), slice(half, None))]
    wants = [expected(case, p) for p in parts]
    return np.concatenate([w.y for w in wants]), np.concatenate([w.dx for w in wants])


def _grouped(case, mapping, spec, **names):
    x, scale, bias, dy, mask = case.arrays()

    def step(x, dy, mask):
        def loss(x):
            y, _ = bnjax.batch_norm(x, scale, bias, mask=mask, **names)
            return jnp.sum(y * dy), y

        dx, y = jax.grad(loss, has_aux=True)(x)
        return y, dx

    return mapping(step, spec)(x, dy, mask)


def _shard_map(mesh, check_vma):
    def mapping(step, spec):
        return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=check_vma))

    return mapping


def _over_slices(transform):
    def mapping(step, spec):
        def whole(x, dy, mask):
            split = jax.tree.map(lambda a: a.reshape(8, -1, *a.shape[1:]), (x, dy, mask))
            y, dx = transform(step, axis_name="data")(*split)
            return y.reshape(x.shape), dx.reshape(x.shape)

        return whole

    return mapping


def _nested_vmap(step, axis_name):
    def nested(*args):
        split = jax.tree.map(lambda a: a.reshape(2, 4, *a.shape[1:]), args)
        return jax.vmap(jax.vmap(step, axis_name=axis_name))(*split)

    return nested


MESH_2D = Mesh(np.array(jax.devices()).reshape(2, 4), ("group", "member"))
WAYS = {
    "index groups, shard_map": (_shard_map(MESH, False), P("data"), dict(axis_name="data", axis_index_groups=GROUPS)),
    "index groups, pmap": (_over_slices(jax.pmap), None, dict(axis_name="data", axis_index_groups=GROUPS)),
    "two vmaps, one named": (_over_slices(_nested_vmap), None, dict(axis_name="data")),
    "two axes, one named": (_shard_map(MESH_2D, True), P(("group", "member")), dict(axis_name="member")),
    "two axes, one named, no vma": (_shard_map(MESH_2D, False), P(("group", "member")), dict(axis_name="member")),
}


@pytest.mark.parametrize("case", ["plain_shards", "uneven_shards", "an_empty_shard", "nan_in_padding"])
@pytest.mark.parametrize("way", WAYS)
def test_groups(way, case):
    case = by_name(case)
    y, dx = _halves(case)
    mapping, spec, names = WAYS[way]
    got_y, got_dx = _grouped(case, mapping, spec, **names)
    assert_close(got_y, y, tolerance(case), what="y")
    assert_close(got_dx, dx, 4 * tolerance(case), what="dx")


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("names", [("group", "member"), ["member", "group"]])
def test_several_names_are_the_whole_mesh(names, check_vma):
    case = by_name("uneven_shards")
    want = expected(case, case.arrays())
    y, dx = _grouped(case, _shard_map(MESH_2D, check_vma), P(("group", "member")), axis_name=names)
    assert_close(y, want.y, tolerance(case), what="y")
    assert_close(dx, want.dx, 4 * tolerance(case), what="dx")


# What is refused -----------------------------------------------------------------------------------------------------


def _forward(check_vma=False, **options):
    mapped = jax.shard_map(
        lambda x: bnjax.batch_norm(x, **options)[0],
        mesh=MESH,
        in_specs=P("data"),
        out_specs=P("data"),
        check_vma=check_vma,
    )
    return jax.jit(mapped)(jnp.ones((16, 3)))


def test_groups_under_check_vma_say_what_to_write():
    with pytest.raises(ValueError, match=r"mesh of two axes.*axis_name='member'"):
        _forward(True, axis_name="data", axis_index_groups=GROUPS)


def test_groups_under_vmap_say_what_to_write():
    with pytest.raises(ValueError, match="nest two vmaps"):
        jax.vmap(lambda x: bnjax.batch_norm(x, axis_name="i", axis_index_groups=GROUPS)[0], axis_name="i")(
            jnp.ones((8, 4, 3))
        )


@pytest.mark.parametrize(
    "groups", [[[0, 1], [2, 3]], [[0, 1, 2, 3], [3, 4, 5, 6]], [[0, 1, 2], [3, 4, 5, 6, 7]], [[0, 1, 2, 3, 4, 5, 6, 8]]]
)
def test_groups_that_do_not_cover_the_axis(groups):
    with pytest.raises(ValueError, match="axis_index_groups must"):
        _forward(axis_name="data", axis_index_groups=groups)


def test_groups_without_a_name():
    with pytest.raises(ValueError, match="give its axis_name"):
        bnjax.batch_norm(jnp.ones((4, 3)), axis_index_groups=[[0], [1]])


@pytest.mark.parametrize("transform", [jax.jit, lambda f: f, jax.vmap])
def test_a_name_that_is_not_bound(transform):
    with pytest.raises(ValueError, match=r"axis_name='batch' is not an axis.*batch of shape.*axis_name=None"):
        transform(lambda x: bnjax.batch_norm(x, axis_name="batch")[0])(jnp.ones((8, 4, 3)))


def test_a_misspelt_name_in_shard_map():
    with pytest.raises(ValueError, match=r"axis_name='dta' is not an axis.*\(2, 3\).*pass the name"):
        _forward(axis_name="dta")
