"""Tests decay_mask and affine_labels: they go by role, in every kind of tree, and refuse unknown roles."""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bnjax
from bnjax import tools
from tests.support import zoo


def leaves(tree):
    """Returns {path: leaf}, with the path as one string."""
    return {
        jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in jax.tree_util.tree_leaves_with_path(tree)
    }


def check_by_name(mask):
    assert mask
    for path, decayed in leaves(mask).items():
        assert decayed == (path.endswith(("kernel", "embedding"))), path


@pytest.mark.parametrize("norm", zoo.LINEN_NORMS)
@pytest.mark.parametrize("net", [zoo.ConvNet, zoo.Nested])
@pytest.mark.parametrize("freeze", [dict, flax.core.freeze])
@pytest.mark.parametrize("given", [True, False])
def test_linen(norm, net, freeze, given):
    _, variables = zoo.linen_net(net, norm=norm)
    params = freeze(variables["params"])
    mask = tools.decay_mask(params, batch_stats=variables["batch_stats"] if given else None)
    check_by_name(mask)
    assert jax.tree.structure(mask) == jax.tree.structure(params)


@pytest.mark.parametrize("norm", zoo.nnx_norms())
def test_nnx(norm):
    model = zoo.nnx_net(norm)
    params = nnx.state(model, nnx.Param)
    check_by_name(tools.decay_mask(params))
    check_by_name(tools.decay_mask(params, batch_stats=nnx.state(model, nnx.BatchStat)))
    check_by_name(tools.decay_mask(nnx.to_pure_dict(params)))
    check_by_name(tools.decay_mask(nnx.state(model)))  # statistics among the parameters are not decayed either


def test_all_the_variables():
    _, variables = zoo.linen_net()
    mask = tools.decay_mask(variables)
    check_by_name(mask["params"])
    assert not any(jax.tree.leaves(mask["batch_stats"]))


def test_restored_by_orbax(tmp_path):
    _, variables = zoo.linen_net()
    restored = zoo.through_orbax(variables, tmp_path)
    check_by_name(tools.decay_mask(restored["params"], batch_stats=restored["batch_stats"]))


def test_restored_nnx_state(tmp_path):
    model = zoo.nnx_net(nnx.BatchNorm)
    restored = zoo.through_orbax(nnx.state(model), tmp_path)
    decayed = {path for path, value in leaves(tools.decay_mask(restored)).items() if value}
    assert decayed == {path for path in leaves(restored) if "kernel" in path}
    assert len(decayed) == 3


def test_decay_moves_kernels_alone():
    _, variables = zoo.linen_net()
    params = variables["params"]
    optimizer = optax.chain(optax.add_decayed_weights(0.1, mask=tools.decay_mask), optax.sgd(1.0))
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    for path, update in leaves(updates).items():
        wanted = -0.1 * leaves(params)[path] if path.endswith("kernel") else 0
        np.testing.assert_allclose(update, np.broadcast_to(wanted, update.shape), rtol=1e-6)


class GammaNorm(nn.Module):
    """Batch normalization as a user may write it, with Keras' names."""

    @nn.compact
    def __call__(self, x):
        shape = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        var = self.variable("batch_stats", "var", jnp.ones, shape)
        gamma = self.param("gamma", nn.initializers.ones, shape)
        beta = self.param("beta", nn.initializers.zeros, shape)
        return bnjax.normalize(x, mean.value, var.value, gamma, beta)


@pytest.fixture
def gamma_net():
    model = nn.Sequential([nn.Dense(4), GammaNorm()])
    return model.init(jax.random.key(0), jnp.ones((2, 3)))


def test_misnamed_layer_is_not_silently_decayed(gamma_net):
    with pytest.raises(ValueError, match=r"layers_1/beta.*layers_1/gamma.*no_decay"):
        tools.decay_mask(gamma_net["params"])
    wanted = {"layers_0": {"kernel": True, "bias": False}, "layers_1": {"beta": False, "gamma": False}}
    assert tools.decay_mask(gamma_net["params"], batch_stats=gamma_net["batch_stats"]) == wanted
    assert tools.decay_mask(gamma_net["params"], no_decay=["gamma", "beta"]) == wanted
    assert tools.decay_mask(gamma_net["params"], no_decay=["layers_1"]) == wanted


def test_misnamed_layer_is_labelled(gamma_net):
    labels = tools.affine_labels(gamma_net["params"], gamma_net["batch_stats"])
    assert labels == {
        "layers_0": {"kernel": "rest", "bias": "rest"},
        "layers_1": {"beta": "affine", "gamma": "affine"},
    }


def test_kernel_of_a_normalization_is_not_decayed():
    params = {"norm": {"kernel": jnp.ones(3)}, "dense": {"kernel": jnp.ones((3, 3))}}
    stats = {"norm": {"mean": jnp.ones(3), "var": jnp.ones(3)}}
    assert tools.decay_mask(params, batch_stats=stats) == {"norm": {"kernel": False}, "dense": {"kernel": True}}


def test_patterns():
    params = {"encoder": {"pos_embedding": jnp.ones(3), "head": {"kernel": jnp.ones(3)}}, "logit_scale": jnp.ones(())}
    mask = tools.decay_mask(params, decay=["pos_*"], no_decay=["logit_scale"])
    assert mask == {"encoder": {"pos_embedding": True, "head": {"kernel": True}}, "logit_scale": False}
    mask = tools.decay_mask(params, decay=["*"], no_decay=["encoder/head", "logit_scale"])
    assert mask == {"encoder": {"pos_embedding": True, "head": {"kernel": False}}, "logit_scale": False}
    with pytest.raises(ValueError, match="'posembedding' fits no parameter"):
        tools.decay_mask(params, decay=["posembedding"])


def test_affine_free_layers_are_accepted():
    model = nn.Sequential([nn.Dense(4), nn.BatchNorm(True, use_scale=False, use_bias=False)])
    variables = model.init(jax.random.key(0), jnp.ones((2, 3)))
    check_by_name(tools.decay_mask(variables["params"], batch_stats=variables["batch_stats"]))


@pytest.mark.parametrize("deeper", ["params", "batch_stats"])
def test_statistics_of_another_model(deeper):
    _, variables = zoo.linen_net()
    variables[deeper] = {"backbone": variables[deeper]}
    for function in (
        lambda: tools.decay_mask(variables["params"], batch_stats=variables["batch_stats"]),
        lambda: tools.affine_labels(variables["params"], variables["batch_stats"]),
    ):
        with pytest.raises(ValueError, match="does not belong to params"):
            function()


def test_trees_without_layers():
    params = {"dense": {"kernel": jnp.ones((2, 2))}}
    for function in (tools.affine_labels, lambda p, s: tools.decay_mask(p, batch_stats=s)):
        with pytest.raises(ValueError, match="holds no batch normalization statistics"):
            function(params, {})
    with pytest.raises(ValueError, match="no parameters"):
        tools.decay_mask({})


def test_labels_train_only_batch_norm():
    _, variables = zoo.linen_net()
    params = variables["params"]
    labels = tools.affine_labels(params, variables["batch_stats"])
    optimizer = optax.multi_transform({"affine": optax.sgd(1.0), "rest": optax.set_to_zero()}, labels)
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(ones, optimizer.init(params), params)
    for path, update in leaves(updates).items():
        np.testing.assert_array_equal(update, -1.0 if path.startswith("BatchNorm") else 0.0, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("norm", zoo.nnx_norms())
def test_nnx_optimizer_takes_both(norm):
    model = zoo.nnx_net(norm)
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    labels = tools.affine_labels(before, nnx.state(model, nnx.BatchStat))
    rest = optax.adamw(0.1, weight_decay=0.5, mask=tools.decay_mask(before))
    transform = optax.multi_transform({"affine": optax.set_to_zero(), "rest": rest}, labels)
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda m: m(zoo.images())[0, 0])(model))
    for path, leaf in leaves(nnx.state(model, nnx.Param)).items():
        assert np.array_equal(leaf, leaves(before)[path]) == path.startswith("norms"), path
