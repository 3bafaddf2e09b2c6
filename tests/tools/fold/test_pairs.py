"""Tests which layers take a normalization: every row of a table, folded at once in one network of branches."""

import functools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax
from bnjax import tools
from tests.tools.fold import branches

Norm = functools.partial(bnjax.linen.BatchNorm, use_running_average=True)
FlaxNorm = functools.partial(nn.BatchNorm, use_running_average=True)
TOLERANCE = 1e-5  # some ten roundings of float32, through a layer

ROWS, SIGNAL, IMAGE, VOLUME = (8, 3), (4, 6, 3), (4, 6, 6, 3), (2, 4, 4, 4, 3)


LECUN = nn.initializers.lecun_normal()


def partitioned(names, init=LECUN, box=nn.with_partitioning):
    return box(init, names)


def boxed_pair(x):
    """Runs a layer without bias and a normalization whose parameters are all in boxes."""
    x = nn.Dense(4, use_bias=False, kernel_init=partitioned((None, "model")))(x)
    return Norm(
        scale_init=partitioned(("model",), nn.initializers.ones), bias_init=partitioned(("model",), nn.zeros_init())
    )(x)


def boxed_next(x):
    init = partitioned(("in", "out"), box=nn.with_logical_partitioning)
    return nn.Dense(4, kernel_init=init, bias_init=partitioned(("out",), nn.zeros_init()))(Norm()(x))


def looped(x):
    """Runs a layer and a normalization inside of a loop over rows that is traced several times."""
    dense, norm = nn.Dense(4), Norm()
    if dense.is_initializing():
        return norm(dense(x))
    return jax.lax.map(lambda row: norm(dense(row)), x)


class Named(nn.Dense):
    """A subclass of a layer that leaves its call alone."""


class Plain(bnjax.linen.BatchNorm):
    """A subclass of a normalization that leaves all of it alone."""


PREVIOUS = {  # branch -> what it runs, the shape of its input
    "dense": (lambda x: Norm()(nn.Dense(4)(x)), ROWS),
    "dense_no_bias": (lambda x: Norm()(nn.Dense(4, use_bias=False)(x)), ROWS),
    "flax": (lambda x: FlaxNorm()(nn.Dense(4)(x)), ROWS),
    "conv_1d": (lambda x: Norm()(nn.Conv(4, (3,))(x)), SIGNAL),
    "conv_3d": (lambda x: Norm()(nn.Conv(4, (2, 2, 2))(x)), VOLUME),
    "dilated": (lambda x: Norm()(nn.Conv(4, (3, 3), kernel_dilation=2, padding="VALID")(x)), IMAGE),
    "input_dilated": (lambda x: Norm()(nn.Conv(4, (3, 3), input_dilation=2, padding=0)(x)), IMAGE),
    "grouped": (lambda x: Norm()(nn.Conv(12, (3, 3), feature_group_count=3)(x)), IMAGE),
    "masked": (lambda x: Norm()(nn.Conv(4, (3,), mask=jnp.tril(jnp.ones((3, 3, 4))))(x)), SIGNAL),
    "transposed": (lambda x: Norm()(nn.ConvTranspose(4, (3, 3), (2, 2))(x)), IMAGE),
    "transposed_no_bias": (lambda x: Norm()(nn.ConvTranspose(4, (3,), use_bias=False)(x)), SIGNAL),
    "transposed_kernel": (lambda x: Norm()(nn.ConvTranspose(4, (3,), transpose_kernel=True)(x)), SIGNAL),
    "no_scale": (lambda x: Norm(use_scale=False)(nn.Dense(4)(x)), ROWS),
    "no_affine": (lambda x: Norm(use_scale=False, use_bias=False)(nn.Dense(4, use_bias=False)(x)), ROWS),
    "offset": (lambda x: Norm(scale_offset=1.0)(nn.Dense(4)(x)), ROWS),
    "epsilon": (lambda x: Norm(epsilon=0.1)(nn.Dense(4)(x)), ROWS),
    "subclasses": (lambda x: Plain(use_running_average=True)(Named(4)(x)), ROWS),
    "given_product": (lambda x: Norm()(nn.Dense(4, dot_general=lambda *a, **k: jax.lax.dot_general(*a, **k))(x)), ROWS),
    "squeezed": (lambda x: Norm()(jnp.squeeze(nn.Conv(4, (1, 6), padding="VALID")(x), 2)), IMAGE),
    "expanded": (lambda x: Norm()(nn.Dense(4)(x)[:, None]), ROWS),
    "flat_rows": (lambda x: Norm()(nn.Conv(4, (3, 3))(x).reshape(-1, 4)), IMAGE),
    "turned": (lambda x: Norm(axis=1)(nn.Dense(4)(x).swapaxes(1, 2)), SIGNAL),
    "pooled": (lambda x: Norm()(nn.avg_pool(nn.Conv(4, (3,))(x), (2,), (2,))), SIGNAL),
    "max_pooled": (lambda x: Norm()(nn.max_pool(nn.Conv(4, (3,))(x), (2,), (2,))), SIGNAL),
    "boxed": (boxed_pair, ROWS),
    "cond": (lambda x: jax.lax.cond(jnp.sum(x) > 0, jnp.sin, jnp.cos, Norm()(nn.Dense(4)(x))), ROWS),
    "switch": (lambda x: jax.lax.switch(1, [jnp.sin, jnp.cos, jnp.tanh], Norm()(nn.Dense(4)(x))), ROWS),
    "while": (lambda x: jax.lax.fori_loop(0, 2, lambda i, y: jnp.sin(y), Norm()(nn.Dense(4)(x))), ROWS),
    "looped": (looped, SIGNAL),
    "unused": (lambda x: (lambda y: (jnp.sum(y), Norm()(y))[1])(nn.Dense(4)(x)), ROWS),
    "jitted": (
        lambda x: jax.checkpoint(nn.relu)(Norm()(jax.jit(lambda y: y.astype(jnp.float32))(nn.Dense(4)(x)))),
        ROWS,
    ),
}
NEXT = {
    "before_dense": (lambda x: nn.Dense(4)(Norm()(x)), ROWS),
    "before_dense_no_bias": (lambda x: nn.Dense(4, use_bias=False)(Norm()(x)), ROWS),
    "before_valid": (lambda x: nn.Conv(4, (3, 3), padding="VALID")(Norm()(x)), IMAGE),
    "before_pointwise": (lambda x: nn.Conv(4, (1, 1), strides=2)(Norm()(x)), IMAGE),
    "before_circular": (lambda x: nn.Conv(4, (3,), padding="CIRCULAR")(Norm()(x)), SIGNAL),
    "before_reflecting": (lambda x: nn.Conv(4, (3,), padding="REFLECT")(Norm()(x)), SIGNAL),
    "before_grouped": (lambda x: nn.Conv(12, (3, 3), padding=0, feature_group_count=3)(Norm()(x)), IMAGE),
    "before_no_affine": (lambda x: nn.Dense(4)(Norm(use_scale=False, use_bias=False)(x)), ROWS),
    "dropout": (lambda x: nn.Dense(4)(nn.Dropout(0.5, deterministic=True)(Norm()(x))), ROWS),
    "flattened": (lambda x: nn.Dense(4)(Norm()(x).reshape(x.shape[0], -1)), SIGNAL),
    "averaged": (lambda x: nn.Dense(4)(Norm()(x).mean((1, 2))), IMAGE),
    "summed": (lambda x: nn.Dense(4)(Norm()(x).sum(1)), SIGNAL),
    "averaged_and_flattened": (lambda x: nn.Dense(4)(Norm()(x).mean(1, keepdims=True).reshape(4, -1)), IMAGE),
    "average_pool": (lambda x: nn.Dense(4)(nn.avg_pool(Norm()(x), (2, 2), (2, 2)).reshape(4, -1)), IMAGE),
    "max_pool": (lambda x: nn.Dense(4)(nn.max_pool(Norm()(x), (3, 3), (2, 2), "SAME").reshape(4, -1)), IMAGE),
    "max": (lambda x: nn.Dense(4)(Norm()(x).max((1, 2))), IMAGE),
    "boxed_next": (boxed_next, ROWS),
}
TABLE = PREVIOUS | NEXT


def close(actual, wanted, largest=TOLERANCE):
    np.testing.assert_allclose(actual, wanted, atol=largest * np.abs(wanted).max(), rtol=0)


def fold_and_run(table, shapes, change=lambda variables: None):
    """Returns the outputs of the model and of both forms of the folded one, the variables, and what fold says.

    The functions and the precision are those that `fold` compiled its comparison with, so that nothing compiles again.
    """
    model, variables, x = branches.linen(table, shapes)
    change(variables)
    apply_fn = model.apply
    result = tools.fold(apply_fn, variables, x)
    calls = ((apply_fn, variables), (apply_fn, result.variables), (result.apply_fn, result.stripped))
    with jax.default_matmul_precision("highest"):
        outputs = [jax.jit(f)(v, x) for f, v in calls]
    return (*outputs, variables, result)


@pytest.fixture(scope="module")
def folded():
    return fold_and_run({n: run for n, (run, _) in TABLE.items()}, {n: s for n, (_, s) in TABLE.items()})


@pytest.mark.parametrize("name", TABLE)
def test_linen(folded, name):
    y, in_place, stripped, _, result = folded
    sides = {pair.norm.split("/")[0]: pair.side for pair in result.pairs}
    assert sides.get(name) == ("previous" if name in PREVIOUS else "next"), result.left
    close(in_place[name], y[name])
    close(stripped[name], y[name])


def test_structure(folded):
    """Checks that nothing of a folded normalization is left in `stripped`, and nothing is missing in `variables`."""
    *_, variables, result = folded
    assert result.left == {}
    assert result.difference <= TOLERANCE
    assert jax.tree.structure(result.variables) == jax.tree.structure(variables)
    names = {"/".join(p[1:-1]) for p in flax.traverse_util.flatten_dict(result.stripped)}
    assert not names & {pair.norm for pair in result.pairs}
    assert set(result.stripped) == {"params"}


def test_boxes_keep_their_names(folded):
    """Checks that a bias that the fold made is on the axis of the kernel's outputs."""
    stripped = folded[-1].stripped["params"]
    assert stripped["boxed"]["Dense_0"]["bias"].names == ("model",)
    assert stripped["boxed"]["Dense_0"]["kernel"].names == (None, "model")
    assert stripped["boxed_next"]["Dense_0"]["bias"].names == ("out",)


LAYERS = {  # nnx: layers, shape of the input, side
    "linear": (lambda norm, r: [nnx.Linear(3, 4, rngs=r), norm(4, rngs=r)], ROWS, "previous"),
    "conv": (lambda norm, r: [nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=r), norm(4, rngs=r)], IMAGE, "previous"),
    "transposed": (lambda norm, r: [nnx.ConvTranspose(3, 4, (3,), 2, rngs=r), norm(4, rngs=r)], SIGNAL, "previous"),
    "squeezed": (lambda norm, r: [nnx.Linear(3, 4, rngs=r), lambda x: x[:, None], norm(4, rngs=r)], ROWS, "previous"),
    "before": (lambda norm, r: [norm(3, rngs=r), nnx.Linear(3, 4, rngs=r)], ROWS, "next"),
    "flattened": (
        lambda norm, r: [norm(3, rngs=r), lambda x: x.reshape(x.shape[0], -1), nnx.Linear(18, 4, rngs=r)],
        SIGNAL,
        "next",
    ),
    "averaged": (lambda norm, r: [norm(3, rngs=r), lambda x: x.mean(1), nnx.Linear(3, 4, rngs=r)], SIGNAL, "next"),
    "max_pool": (
        lambda norm, r: [norm(3, rngs=r), lambda x: nnx.max_pool(x, (2,), (2,)), nnx.Linear(3, 4, rngs=r)],
        SIGNAL,
        "next",
    ),
    "partitioned": (
        lambda norm, r: [
            nnx.Linear(3, 4, kernel_init=nnx.with_partitioning(nnx.initializers.normal(), (None, "m")), rngs=r),
            norm(4, scale_init=nnx.with_partitioning(nnx.initializers.ones_init(), ("m",)), rngs=r),
        ],
        ROWS,
        "previous",
    ),
}


@pytest.mark.parametrize("norm", [nnx.BatchNorm, bnjax.nnx.BatchNorm])
def test_nnx(norm):
    table = {name: functools.partial(make, norm) for name, (make, *_) in LAYERS.items()}
    with nnx.use_eager_sharding(False):  # the names of axes are kept, and there is no mesh
        model, x = branches.in_nnx(table, {name: shape for name, (_, shape, _) in LAYERS.items()})
        result = tools.fold(lambda m, x: m(x), model, x)
        run = jax.jit(lambda graph, state, x: nnx.merge(graph, state)(x), static_argnums=0)
        y, *others = (run(*nnx.split(m), x) for m in (model, result.variables, result.stripped))
    assert result.left == {}
    assert {pair.norm.split("/")[1]: pair.side for pair in result.pairs} == {n: s for n, (*_, s) in LAYERS.items()}
    for other in others:
        jax.tree.map(close, other, y)
    assert not jax.tree.leaves(nnx.state(result.stripped, nnx.BatchStat))


def test_both_sides_of_one_layer():
    """Checks BN → Dense → BN: the dense layer absorbs the norm before it and the one after it."""
    table = {"both": lambda x: nn.relu(Norm()(nn.Dense(4)(Norm()(x))))}
    y, _, stripped, _, result = fold_and_run(table, {"both": ROWS})
    assert [pair.side for pair in result.pairs] == ["next", "previous"]
    close(stripped["both"], y["both"])


def attention(x):
    """Runs queries, keys and values of one normalized input, the keys without a bias."""
    y = Norm()(x)
    query, keys, values = (nn.Dense(4, use_bias=name != "keys", name=name)(y) for name in ("query", "keys", "values"))
    return nn.softmax(query @ keys.swapaxes(-1, -2)) @ values


def two_heads(x):
    """Runs two heads, of which one reads the mean over positions, and a normalization behind the other."""
    y = Norm()(x)
    return Norm()(nn.Dense(4)(y)).mean(1) + nn.Dense(4)(y.mean(1))


def test_several_layers_behind():
    """Checks that all layers that use the output of a normalization take it, each by itself."""
    shapes = {"attention": SIGNAL, "two_heads": SIGNAL}
    y, kept, stripped, _, result = fold_and_run({"attention": attention, "two_heads": two_heads}, shapes)
    assert result.left == {}
    taken = [(pair.norm.rsplit("/")[-1], pair.layer.rsplit("/")[-1], pair.side) for pair in result.pairs]
    assert taken == [
        *(("BatchNorm_0", name, "next") for name in ("query", "keys", "values")),
        *(("BatchNorm_0", name, "next") for name in ("Dense_0", "Dense_1")),
        ("BatchNorm_1", "Dense_0", "previous"),
    ]
    jax.tree.map(close, stripped, y)
    jax.tree.map(close, kept, y)


def test_several_layers_behind_in_nnx():
    class Attention(nnx.Module):
        def __init__(self, rngs):
            self.norm = bnjax.nnx.BatchNorm(3, use_running_average=True, rngs=rngs)
            self.query = nnx.Linear(3, 4, rngs=rngs)
            self.keys = nnx.Linear(3, 4, use_bias=False, rngs=rngs)

        def __call__(self, x):
            y = self.norm(x)
            return self.query(y) * self.keys(y)

    model, x = Attention(nnx.Rngs(0)), jax.random.normal(jax.random.key(0), ROWS)
    model.norm.mean[...], model.norm.var[...] = jnp.array([1.0, -2.0, 3.0]), jnp.array([0.5, 2.0, 4.0])
    result = tools.fold(lambda model, x: model(x), model, x)
    assert [pair.layer for pair in result.pairs] == ["query", "keys"] and result.left == {}
    close(result.stripped(x), model(x))
    close(result.variables(x), model(x))


def test_channels_of_scale_zero():
    """Checks that channels with scale zero fold without a division by zero."""
    table = {name: TABLE[name][0] for name in ("dense", "before_dense", "before_dense_no_bias")}

    def change(variables):
        for branch in variables["params"].values():
            branch["BatchNorm_0"]["scale"] = branch["BatchNorm_0"]["scale"].at[1].set(0.0)

    y, _, stripped, _, result = fold_and_run(table, dict.fromkeys(table, ROWS), change)
    assert len(result.pairs) == len(table)
    jax.tree.map(close, stripped, y)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_keeps_the_dtypes(dtype):
    """Checks layers that compute in half precision: folding rounds kernel, product and bias there, and no more."""
    table = {
        "out": lambda x: nn.relu(Norm(dtype=jnp.float32)(nn.Conv(4, (3,), dtype=dtype)(x))),
        "in": lambda x: nn.Dense(4, dtype=dtype)(Norm(dtype=dtype)(x)),
    }
    y, _, stripped, _, result = fold_and_run(table, dict.fromkeys(table, SIGNAL))
    assert len(result.pairs) == 2
    assert jax.tree.map(jnp.result_type, stripped) == jax.tree.map(jnp.result_type, y)
    assert result.difference < 4 * float(jnp.finfo(dtype).eps)
