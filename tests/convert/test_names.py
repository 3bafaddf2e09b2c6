"""Tests names that differ between libraries: prefixes, given and proposed maps, and two modules with one name."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax
from bnjax import tools
from tests.convert.libraries import LIBRARIES, each_library, network
from tests.support import zoo


@each_library
def test_a_prefix_is_given_once(library):
    given, to, separator = LIBRARIES[library]
    variables, blank = network()
    for prefix in ("net", f"net{separator}", f"net{separator}body"):
        state = to(variables, prefix=prefix)
        start = prefix.removesuffix(separator) + separator
        assert all(name.startswith(start) for name in state)
        zoo.assert_trees_equal(given(state, blank, prefix=prefix), variables)
        others = {**state, f"other{separator}x": np.ones(3)}
        zoo.assert_trees_equal(given(others, blank, prefix=prefix), variables)
        with pytest.raises(ValueError, match=f"All of it fits with prefix='{start}'"):
            given(state, blank)
    with pytest.raises(ValueError, match=r"no name in state begins with prefix='nte"):
        given(state, blank, prefix="nte")


@each_library
def test_names_hold_for_what_is_below(library):
    given, to, separator = LIBRARIES[library]
    _, plain = zoo.linen_net()
    nested = {collection: {"body": {"in": held}} for collection, held in plain.items()}
    names = {"body": "features", "body/in/Dense_0": "classifier", "body/in/Conv_0": f"stem{separator}0"}
    state = to(nested, names=names)
    firsts = {name.split(separator)[0] for name in state}
    assert firsts == {"features", "classifier", "stem"}
    assert any(name.startswith(f"features{separator}in{separator}BatchNorm_1{separator}") for name in state)
    zoo.assert_trees_equal(given(state, zoo.trained(nested, 8), names=names), nested)
    assert to(plain, names={"": "net"}).keys() == to(plain, prefix="net").keys()
    for wrong, message in [
        ({"body/out": "x"}, r"names: \['body/out'\] are no modules.* Did you mean"),
        ("body", "names maps paths"),
    ]:
        with pytest.raises(ValueError, match=message):
            given(state, nested, names=wrong)


@each_library
def test_two_modules_of_one_name(library):
    """Checks that two modules with one name are an error: they would overwrite each other or get equal values."""
    given, to, separator = LIBRARIES[library]
    variables, blank = network()
    for names in ({"Conv_0": "a", "Conv_1": "a"}, {"Conv_0": "Conv_1"}, {"BatchNorm_0": "BatchNorm_1"}):
        with pytest.raises(ValueError, match=r"get one name elsewhere"):
            to(variables, names=names)
        with pytest.raises(ValueError, match=r"get one name elsewhere"):
            given(to(variables), blank, names=names)
    # without biases nothing but the kernels is of one name; these are no separable convolution
    for shapes in (((3, 3, 2, 4), (3, 3, 4, 4)), ((3, 3, 1, 4), (1, 1, 5, 4)), ((3, 3, 2, 4), (1, 1, 4, 4))):
        two = {"params": {f"Conv_{i}": {"kernel": jnp.ones(shape)} for i, shape in enumerate(shapes)}}
        for call in (lambda **o: to(two, **o), lambda **o: given(to(two), two, **o)):  # noqa: B023
            with pytest.raises(ValueError, match=r"get one name elsewhere"):
                call(names={"Conv_0": "a", "Conv_1": "a"})


class Deep(nn.Module):
    """Twelve blocks of equal shapes, with names that tell their order or names that do not."""

    named: bool

    @nn.compact
    def __call__(self, x):
        def name(kind, i):
            return f"{'zyxwvutsrqpon'[i]}{kind}" if self.named else None  # the alphabet's order is not that of the run

        for i in range(12):
            x = nn.Conv(4, (3, 3), name=name("conv", i))(x)
            x = nn.relu(bnjax.BatchNorm(use_running_average=True, name=name("bn", i))(x))
        return nn.Dense(5, name="head")(x.mean((1, 2)))


def deep(named):
    model, x = Deep(named), jnp.ones((1, 6, 6, 4))
    return model, x, zoo.trained(jax.eval_shape(model.init, jax.random.key(0), x))


def elsewhere(library, variables):
    """Returns the state as the other library would store it, with its own names and order of layers."""
    _, to, separator = LIBRARIES[library]
    letters = "zyxwvutsrqpon"
    numbered = {"Conv": 0, "conv": 0, "BatchNorm": 1, "bn": 1}
    names = {}
    for module in variables["params"]:
        kind, _, number = module.partition("_")
        at = int(number) if number else letters.find(module[0])
        kind = kind if number else module[1:]
        if kind in numbered:
            names[module] = f"net{separator}{3 * at + numbered[kind]}"
    state = to(variables, names=names | {"head": "classifier"}, transposed=())
    number = lambda key: [int(p) if p.isdigit() else 99 for p in key.split(separator)]  # noqa: E731
    return dict(sorted(state.items(), key=lambda item: number(item[0]))), names | {"head": "classifier"}


@each_library
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("alphabetical", [False, True])
def test_a_map_is_proposed(library, named, alphabetical):
    """Checks proposals by shape and order, for 25 modules of three shapes, also if "10" is sorted before "9"."""
    given = LIBRARIES[library][0]
    model, x, variables = deep(named)
    state, wanted = elsewhere(library, variables)
    state = dict(sorted(state.items())) if alphabetical else state
    blank = jax.eval_shape(model.init, jax.random.key(0), x)
    traced = dict(apply_fn=model.apply, x=x)
    names = tools.propose_names(state, blank, library=library, **traced)
    assert names == wanted
    zoo.assert_trees_equal(given(state, blank, names=names, **traced), variables)
    with pytest.raises(ValueError, match=r"all 25 modules fit with names=bnjax.tools.propose_names") as error:
        given(state, blank, **traced)
    assert len(str(error.value)) < 1500  # and not every key
    names = tools.propose_names(state, blank, library=library)
    assert names == (wanted if not named else {"head": "classifier"})  # a name that says no order is no proposal


@each_library
def test_a_proposal_for_an_nnx_module(library):
    """Checks that attributes count in the order of their definition, whatever their names."""
    given, to, separator = LIBRARIES[library]
    wanted = {name: f"net{separator}{i}" for i, name in enumerate(("z", "bn", "a", "norm", "m"))}

    class Module(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.z = nnx.Conv(3, 3, (3, 3), rngs=rngs)
            self.bn = bnjax.nnx.BatchNorm(3, rngs=rngs)
            self.a = nnx.Conv(3, 3, (3, 3), rngs=rngs)
            self.norm = bnjax.nnx.BatchNorm(3, rngs=rngs)
            self.m = nnx.Conv(3, 3, (3, 3), rngs=rngs)

    blank = Module()
    graph, values = nnx.split(blank)
    model = nnx.merge(graph, zoo.trained(values))
    state = to(model, names=wanted)
    state = dict(sorted(state.items(), key=lambda item: item[0].split(separator)[1]))
    assert tools.propose_names(state, blank, library=library) == wanted
    zoo.assert_trees_equal(nnx.state(given(state, blank, names=wanted)), nnx.state(model))


class Branches(nn.Module):
    """Residual blocks whose shortcut runs first; all normalizations of a block have one shape."""

    @nn.compact
    def __call__(self, x):
        def layer(x, width, size, kind):
            x = nn.Conv(width, (size, size), use_bias=False, name=f"{kind}_conv")(x)
            return bnjax.BatchNorm(use_running_average=True, name=f"{kind}_bn")(x)

        for i, width in enumerate((4, 6, 6)):
            beside = layer(x, width, 1, f"b{i}_short")
            x = nn.relu(beside + layer(nn.relu(layer(x, width, 3, f"b{i}_one")), width, 3, f"b{i}_two"))
        return x


@each_library
def test_branches_in_another_order(library):
    """Checks shortcuts that PyTorch defines last: the layers before each one identify it."""
    given, to, separator = LIBRARIES[library]
    model, x = Branches(), jnp.ones((1, 6, 6, 3))
    variables = zoo.trained(jax.eval_shape(model.init, jax.random.key(0), x))
    wanted = {
        f"b{i}_{kind}_{layer}": separator.join(("layers", str(i), there + str(at)))
        for i in range(3)
        for kind, there in (("one", "main"), ("two", "main_b"), ("short", "down"))
        for at, layer in enumerate(("conv", "bn"))
    }
    state = to(variables, names=wanted, transposed=())
    order = list(wanted.values())
    state = dict(sorted(state.items(), key=lambda item: order.index(item[0].rpartition(separator)[0])))
    traced = dict(apply_fn=model.apply, x=x)
    names = tools.propose_names(state, jax.eval_shape(lambda v: v, variables), library=library, **traced)
    assert names == wanted
    zoo.assert_trees_equal(given(state, zoo.trained(variables, 3), names=names, **traced), variables)


@each_library
def test_what_does_not_correspond_is_named(library):
    """Checks one module too many on either side: the others are matched, and the error names the rest."""
    given, to, separator = LIBRARIES[library]
    variables, blank = network()
    state = to(variables, names={m: f"net{separator}{i}" for i, m in enumerate(variables["params"])})
    extra = {**state, f"aux{separator}bias": np.ones(77)}
    with pytest.raises(ValueError, match=r"6 modules .* have a counterpart.* and \['aux'\] are left of the state"):
        given(extra, blank)
    lacking = {k: v for k, v in state.items() if not k.startswith(f"net{separator}0{separator}")}
    with pytest.raises(ValueError, match=r"5 modules .* have a counterpart in the state, \['\w+'\] have none"):
        given(lacking, blank)
    assert len(tools.propose_names(lacking, blank, library=library)) == 5
    with pytest.raises(ValueError, match=r"library must be one of \['haiku', 'keras', 'torch'\]"):
        tools.propose_names(state, blank, library="tensorflow")


def test_a_proposal_for_haiku():
    _, variables = zoo.linen_net()
    trees = tools.to_haiku(variables, *zoo.haiku_like(variables))
    prefixed = [{f"net/~/{module}": held for module, held in tree.items()} for tree in trees]
    merged = {**prefixed[0], **prefixed[1]}
    names = tools.propose_names(merged, variables, library="haiku")
    assert names == {module: f"net/~/{module}" for module in variables["params"]}
    zoo.assert_trees_equal(tools.from_haiku(*prefixed, zoo.trained(variables, 3), names=names), variables)
    with pytest.raises(ValueError, match=r"All of it fits with prefix='net/~/'|fits with names="):
        tools.from_haiku(*prefixed, variables)


class Backwards(nnx.Module):
    """Runs its layers in an order other than the alphabetical one of their names."""

    def __init__(self, rngs):
        self.z = nnx.Linear(4, 4, rngs=rngs)
        self.m = nnx.Linear(4, 4, rngs=rngs)
        self.a = nnx.Linear(4, 4, rngs=rngs)


@pytest.mark.parametrize("copied", [False, True])
def test_sorted_attributes_say_nothing_of_the_order(copied):
    """Checks that layers of one shape are left out of the proposal where a copy of the module has lost their order."""
    state = {f"net.{i}.{name}": np.ones(shape) for i in range(3) for name, shape in (("weight", (4, 4)), ("bias", 4))}
    make = lambda: Backwards(nnx.Rngs(0))  # noqa: E731
    found = tools.propose_names(state, nnx.eval_shape(make) if copied else make(), library="torch")
    assert found == ({} if copied else {"z": "net.0", "m": "net.1", "a": "net.2"})
