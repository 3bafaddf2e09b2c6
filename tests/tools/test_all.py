"""Tests properties of every tool: a runnable example, an error for trees without statistics, trees from Orbax."""

import functools
import inspect
import operator
import re

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import bnjax
from bnjax import tools
from tests.support import zoo

X = zoo.images()
MODEL = zoo.ConvNet()
apply_fn = functools.partial(MODEL.apply, mutable=["batch_stats"])


def other():
    """Returns another tree of the same network."""
    return zoo.trained(zoo.linen_net()[1], 9)


def moments():
    """Returns moments for each layer of the network."""
    return {f"BatchNorm_{i}": bnjax.Moments(*[np.full(c, 0.5, np.float32)] * 3) for i, c in enumerate((4, 6))}


def of_statistics(function, *arguments):
    """Wraps a tool that takes the two collections into a function of all variables."""
    return lambda v: function(*arguments, v.get("params", {}), v.get("batch_stats", {}))


def labelled(params, stats):
    """Returns what Tent's optimizer does to the parameters as gradients."""
    optimizer = tools.tent(optax.sgd(1.0), params, stats)
    return optimizer.update(params, optimizer.init(params), params)[0]


def to_haiku(variables):
    trees = zoo.haiku_like(other())
    return tools.to_haiku(variables, *trees)


# Each tool that takes a tree, as a function of linen variables whose results are compared.
LINEN = {
    "adapt_statistics": lambda v: tools.adapt_statistics(apply_fn, v, X, prior=1),
    "affine_labels": of_statistics(tools.affine_labels),
    "apply_moments": lambda v: tools.apply_moments(
        v.get("batch_stats", {}), {k: m._asdict() for k, m in moments().items()}
    ),
    "collect_moments": lambda v: tools.collect_moments(apply_fn, v, [X], progress=False),
    "copy_stats": lambda v: tools.copy_stats(v, other()),
    "decay_mask": of_statistics(lambda params, stats: tools.decay_mask(params, batch_stats=stats)),
    "fold": lambda v: tools.fold(MODEL.apply, v, X).variables,
    "follow": lambda v: tools.follow(v, other()),
    "from_haiku": lambda v: tools.from_haiku(*to_haiku(other()), v),
    "from_keras": lambda v: tools.from_keras(tools.to_keras(other()), v),
    "from_torch": lambda v: tools.from_torch(tools.to_torch(other()), v),
    "inspect": lambda v: str(tools.inspect(v)),
    "merge_stats": lambda v: tools.merge_stats([v, other()]),
    "propose_names": lambda v: tools.propose_names(tools.to_torch(other()), v, library="torch"),
    "recalibrate": lambda v: tools.recalibrate(apply_fn, v, [X], progress=False),
    "reset_stats": tools.reset_stats,
    "tent": of_statistics(labelled),
    "to_haiku": to_haiku,
    "to_keras": tools.to_keras,
    "to_torch": tools.to_torch,
    "weigh_examples": lambda v: tools.weigh_examples(MODEL.apply, v, X, weight=0.5),
}
# Each tool as a function of an nnx module; tools that take collections get its states.
NNX = {
    "adapt_statistics": lambda m: tools.adapt_statistics(lambda m, x: m(x), m, X, prior=1),
    "affine_labels": lambda m: tools.affine_labels(nnx.state(m, nnx.Param), nnx.state(m, nnx.BatchStat)),
    "collect_moments": lambda m: tools.collect_moments(lambda m, x: m(x), m, [X], progress=False),
    "copy_stats": lambda m: tools.copy_stats(m, other_nnx()),
    "decay_mask": lambda m: tools.decay_mask(nnx.state(m, nnx.Param), batch_stats=nnx.state(m, nnx.BatchStat)),
    "fold": lambda m: tools.fold(lambda m, x: m(x), m, X).variables,
    "follow": lambda m: tools.follow(m, other_nnx()),
    "from_keras": lambda m: tools.from_keras(tools.to_keras(other_nnx()), m),
    "from_torch": lambda m: tools.from_torch(tools.to_torch(other_nnx()), m),
    "inspect": lambda m: str(tools.inspect(m)),
    "merge_stats": lambda m: tools.merge_stats([m, other_nnx()]),
    "propose_names": lambda m: tools.propose_names(tools.to_torch(other_nnx()), m, library="torch"),
    "recalibrate": lambda m: tools.recalibrate(lambda m, x: m(x), m, [X], progress=False),
    "reset_stats": tools.reset_stats,
    "tent": lambda m: labelled(nnx.state(m, nnx.Param), nnx.state(m, nnx.BatchStat)),
    "to_keras": tools.to_keras,
    "to_torch": tools.to_torch,
    "weigh_examples": lambda m: tools.weigh_examples(lambda m, x: m(x), m, X, weight=0.5),
}
NO_TREE = {
    "centre_kernels",
    "entropy",
    "fields_from_haiku",
    "fields_from_torch",
    "read_arrays",
    "frozen_norms",
    "masked_norms",
    "swap",
    "swap_back",
    "swapped_norms",
}
LINEN_ONLY = {"apply_moments", "from_haiku", "to_haiku"}  # tools that take linen collections only
CONVERTERS = {
    "from_keras",
    "from_torch",
    "propose_names",
    "to_keras",
    "to_torch",
}  # tools that also take folded networks
FUNCTIONS = sorted(name for name, value in vars(tools).items() if inspect.isfunction(value))


def other_nnx():
    model = zoo.NnxNet(bnjax.nnx.BatchNorm, nnx.Rngs(3))
    model.eval()
    return model


def nnx_moments():
    return {name.replace("BatchNorm_", "norms/"): m for name, m in moments().items()}


def test_the_tables_name_every_tool():
    assert LINEN.keys() | NO_TREE == set(FUNCTIONS)
    assert LINEN.keys() - NNX.keys() == LINEN_ONLY


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_tool_has_an_example(name):
    """Checks that the docstring has an example, which the suite runs as a doctest, and its sections."""
    doc = inspect.getdoc(getattr(tools, name))
    assert ">>> " in doc
    for part in ("Args:", "Examples:"):
        assert part in doc, part
    assert "Raises:" in doc or name == "entropy"


FOR_MODELS_OF_FLAX = {"masked_norms", "swap", "swap_back", "swapped_norms"}  # their examples build layers of Flax


@pytest.mark.parametrize("name", [name for name in vars(tools) if not name.startswith("_")])
def test_docstrings_name_the_layers_that_they_mean(name):
    """Checks that a layer is one of bnjax that exists, or is said to be another library's by its full name."""
    prose, _, examples = inspect.getdoc(getattr(tools, name)).partition("Examples:")
    text = prose if name in FOR_MODELS_OF_FLAX else prose + examples
    for layer in re.findall(r"(?<![\w.])((?:\w+\.)+\w*Norm\w*)", text):
        library, _, path = layer.partition(".")
        assert library in ("bnjax", "flax", "haiku", "keras", "torch"), f"{layer} may be Flax's or bnjax's"
        if library == "bnjax":
            operator.attrgetter(path)(bnjax)


@pytest.mark.parametrize("name", LINEN)
def test_a_tree_without_statistics(name):
    variables = zoo.linen_net()[1]
    with pytest.raises(ValueError, match="holds no batch normalization statistics"):
        LINEN[name]({"params": variables["params"]})


class Plain(nnx.Module):
    """A module without batch normalization."""

    def __init__(self, rngs):
        self.head = nnx.Linear(3, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(x)


@pytest.mark.parametrize("name", sorted(NNX.keys() - CONVERTERS))
def test_a_module_without_statistics(name):
    with pytest.raises(ValueError, match="holds no batch normalization statistics"):
        NNX[name](Plain(nnx.Rngs(0)))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Returns a linen network and an nnx module, each with what Orbax restores of it."""
    variables, model = zoo.linen_net()[1], zoo.nnx_net(bnjax.nnx.BatchNorm)
    model.eval()
    restored = zoo.through_orbax(nnx.to_pure_dict(nnx.state(model)), tmp_path_factory.mktemp("nnx"))
    again = other_nnx()
    state = nnx.state(again)
    nnx.replace_by_pure_dict(state, nnx.restore_int_paths(restored))
    nnx.update(again, state)
    return {
        "linen": (variables, zoo.through_orbax(variables, tmp_path_factory.mktemp("linen"))),
        "nnx": (model, again),
    }


def plain(result):
    """Returns a tool's result as a tree of arrays, numbers or strings."""
    return nnx.to_pure_dict(nnx.state(result)) if isinstance(result, nnx.Module) else result


@pytest.mark.parametrize("name", LINEN)
def test_linen_checkpoints(checkpoints, name):
    saved, restored = checkpoints["linen"]
    zoo.assert_trees_equal(plain(LINEN[name](restored)), plain(LINEN[name](saved)))


@pytest.mark.parametrize("name", NNX)
def test_nnx_checkpoints(checkpoints, name):
    saved, restored = checkpoints["nnx"]
    zoo.assert_trees_equal(plain(NNX[name](restored)), plain(NNX[name](saved)))


def test_frozen_norms_on_a_checkpoint(checkpoints):
    saved, restored = checkpoints["linen"]
    with tools.frozen_norms():
        y, updates = MODEL.apply(restored, X, train=True, mutable=["batch_stats"])
    zoo.assert_trees_equal(updates["batch_stats"], saved["batch_stats"])
    np.testing.assert_allclose(y, MODEL.apply(saved, X), rtol=1e-5, atol=1e-5)


def test_labels_of_stacked_layers():
    """Checks that a scale of rank two, from scan or vmap, is recognised as a scale."""
    _, variables = zoo.linen_net(zoo.Nested)
    params = variables["params"]
    labels = tools.affine_labels(params, variables["batch_stats"])
    optimizer = optax.multi_transform({"affine": optax.sgd(1.0), "rest": optax.set_to_zero()}, labels)
    ones = jax.tree.map(np.ones_like, params)
    updates, _ = optimizer.update(ones, optimizer.init(params), params)
    trained = {jax.tree_util.keystr(k): np.any(u) for k, u in jax.tree_util.tree_leaves_with_path(updates)}
    assert trained == {path: "Dense" not in path for path in trained}
    assert sum(trained.values()) == 4
    assert params["twins"]["scale"].shape == (2, 3)


def test_masks_and_labels_of_vmapped_modules():
    """Checks the stacked variables that nnx.vmap creates."""

    @nnx.split_rngs(splits=4)
    @nnx.vmap(in_axes=0)
    def stacked(rngs):
        return zoo.NnxNet(bnjax.nnx.BatchNorm, rngs)

    model = stacked(nnx.Rngs(0))
    params, stats = nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)
    assert params["norms"][1]["scale"].shape == (4, 6)
    mask, labels = tools.decay_mask(params, batch_stats=stats), tools.affine_labels(params, stats)
    for keys, decayed in jax.tree_util.tree_leaves_with_path(mask):
        assert decayed == ("kernel" in jax.tree_util.keystr(keys))
    for keys, label in jax.tree_util.tree_leaves_with_path(labels):
        assert (label == "affine") == ("norms" in jax.tree_util.keystr(keys))
