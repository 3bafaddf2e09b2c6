"""Tests swap, swap_back, swapped_norms and masked_norms on networks from packages, which nobody here wrote.

`pytest -s` shows how far outputs and statistics are apart.
"""

import sys

import flax.linen as nn
import flax.nnx.module
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

import bnjax
from bnjax import tools
from tests.support import zoo

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of the packages
]
TOLERANCE = 1e-4  # of the largest value: some ten roundings of float32 in each of up to twenty layers


@pytest.fixture(autouse=True)
def rank_promotion():
    with jax.numpy_rank_promotion("allow"):
        yield


def agree(what, actual, wanted):
    """Asserts that trees are equal to rounding, each array by its largest value, and prints the difference."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True)
    apart = max(float(np.abs(a.reshape(w.shape) - w).max() / np.abs(w).max()) for a, w in pairs)
    print(f"\n{what}: {apart:.1e} of the largest value")
    assert apart < TOLERANCE, what


def in_parts(run, x):
    """Runs two halves of a batch that share an axis; returns their outputs as one, and the statistics of a part."""
    y, stats = jax.vmap(run, axis_name="parts", out_axes=(0, None))(x.reshape(2, -1, *x.shape[1:]))
    return y, stats


def test_a_linen_resnet():
    """Checks a ResNet-18 whose package has a copy of Flax's layer: 20 layers, over an axis too."""
    from flaxmodels.resnet import ResNet18, ops

    model = ResNet18(output="logits", pretrained=None, normalize=False, num_classes=10)
    x = jax.random.normal(jax.random.key(0), (8, 32, 32, 3))
    variables = zoo.trained(jax.eval_shape(model.init, jax.random.key(0), x))
    assert len(jax.tree.leaves(variables["batch_stats"])) == 2 * 20

    def run(variables, x, train, **fields):
        def apply():
            return model.apply(variables, x, train=train, mutable=["batch_stats"])

        if not fields:
            return apply()
        with tools.swapped_norms(copies=[ops.BatchNorm], **fields):
            return apply()

    run_jitted = jax.jit(run, static_argnames=("train", "momentum"))
    agree("evaluation", run_jitted(variables, x, False, momentum=0.1), run_jitted(variables, x, False))
    wanted = run_jitted(variables, x, True)
    agree("a step", run_jitted(variables, x, True, momentum=0.1), wanted)
    axis = jax.jit(lambda v, x: in_parts(lambda x: run(v, x, True, axis_name="parts"), x))
    agree("a step in parts", axis(variables, x), wanted)
    # each layer is swapped: with momentum 0 the averages of each are those of the batch
    met = run_jitted(variables, x, True, momentum=0.0)[1]
    implied = jax.tree.map(
        lambda new, old: (new - 0.1 * old) / 0.9, wanted[1], {"batch_stats": variables["batch_stats"]}
    )
    agree("momentum of every layer", met, implied)


def moments_of(x, rows):
    """Computes mean and variance of each channel over some rows, in NumPy and float64."""
    x = np.asarray(x, np.float64)[rows]
    axes = tuple(range(x.ndim - 1))
    return {"mean": x.mean(axes), "var": x.var(axes)}


def test_a_mask_in_linen():
    """Checks each of 20 layers that are given no mask, on a batch of NaN but for five rows, against NumPy."""
    from flaxmodels.resnet import ResNet18, ops

    model = ResNet18(output="logits", pretrained=None, normalize=False, num_classes=10)
    x, rows = jax.random.normal(jax.random.key(0), (8, 32, 32, 3)), np.arange(8) < 5
    variables = zoo.trained(jax.eval_shape(model.init, jax.random.key(0), x))
    met = {}

    def keep(method, args, kwargs, context):
        if isinstance(context.module, ops.BatchNorm) and context.method_name == "__call__":
            met[context.module.path] = args[0]
        return method(*args, **kwargs)

    with nn.intercept_methods(keep), tools.swapped_norms(copies=[ops.BatchNorm], mask=rows, momentum=0.0):
        y, updates = model.apply(variables, x.at[5:].set(jnp.nan), train=True, mutable=["batch_stats"])
    found = flatten_dict(updates["batch_stats"], is_leaf=lambda path, value: "mean" in value)
    assert found.keys() == met.keys() and len(met) == 20
    wanted = {path: moments_of(value, rows) for path, value in met.items()}
    agree("statistics", dict(sorted(found.items())), dict(sorted(wanted.items())))
    agree("output", y[:5], model.apply(variables, x[:5], train=True, mutable=["batch_stats"])[0])


def test_an_nnx_network(monkeypatch):
    """Checks stages of FasterViT, six layers with two values of epsilon: swapped, over an axis, masked, and back."""
    for name, module in (("flax.nnx.nnx", flax.nnx), ("flax.nnx.nnx.module", flax.nnx.module)):
        monkeypatch.setitem(sys.modules, name, module)  # where Flax had it when the package was written
    from jimmy.layers.blocks import ConvBlock
    from jimmy.layers.configs import ConvBlockConfig
    from jimmy.layers.patch import ConvPatchEmbed

    def build():
        rngs = nnx.Rngs(0)
        blocks = [ConvBlock(16, ConvBlockConfig(), rngs=rngs) for _ in range(2)]
        return nnx.Sequential(ConvPatchEmbed(3, 8, 16, rngs=rngs), *blocks)

    graph, values = nnx.split(nnx.eval_shape(build))
    model = nnx.merge(graph, zoo.trained(values))
    x = jax.random.normal(jax.random.key(0), (8, 16, 16, 3))

    def run(graph, state, x):
        here = nnx.merge(graph, state, copy=True)
        return here(x), nnx.to_pure_dict(nnx.state(here, nnx.BatchStat))

    jitted = jax.jit(run, static_argnums=0)
    swapped = tools.swap(model, use_running_average=False)
    norms = [m for _, m in nnx.iter_modules(swapped) if isinstance(m, bnjax.nnx.BatchNorm)]
    assert len(norms) == 6
    assert sorted(m.epsilon for m in norms) == [1e-5] * 4 + [1e-4] * 2
    for name, train in (("a step", True), ("evaluation", False)):
        for m in (model, swapped):
            m.train() if train else m.eval()
        agree(name, jitted(*nnx.split(swapped), x), jitted(*nnx.split(model), x))
    model.train()
    parts, state = nnx.split(tools.swap(model, axis_name="parts"))
    axis = jax.jit(lambda state, x: in_parts(lambda x: run(parts, state, x), x))
    agree("a step in parts", axis(state, x), jitted(*nnx.split(model), x))
    graph, state = nnx.split(tools.swap(model))
    with tools.masked_norms(np.arange(8) < 5):
        y, stats = run(graph, state, x.at[5:].set(jnp.nan))
    agree("five rows of eight", (y[:5], stats), jitted(*nnx.split(model), x[:5]))
    back = tools.swap_back(swapped)
    assert not any(isinstance(m, bnjax.nnx.BatchNorm) for _, m in nnx.iter_modules(back))
    zoo.assert_trees_equal(nnx.to_pure_dict(nnx.state(back)), nnx.to_pure_dict(nnx.state(model)))
