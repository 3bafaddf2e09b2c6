"""Tests swap, swap_back and swapped_norms on networks that were written with Flax's BatchNorm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import bnjax
from bnjax import tools
from tests.support import zoo

TOLERANCE = 1e-5  # some ten roundings of float32, through three layers


class Twice(nnx.Module):
    """A network that holds one normalization in two places."""

    def __init__(self):
        self.first = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
        self.held = nnx.List([self.first])

    def __call__(self, x):
        return self.held[0](self.first(x))


def test_values_stay_in_nnx():
    model, x = zoo.nnx_net(nnx.BatchNorm), zoo.images()
    model.eval()
    swapped = tools.swap(model, axis_name=None, momentum=0.5)
    assert [type(norm) for norm in swapped.norms] == [bnjax.nnx.BatchNorm] * 2
    assert [norm.momentum for norm in swapped.norms] == [0.5] * 2
    np.testing.assert_allclose(swapped(x), model(x), atol=TOLERANCE)
    back = tools.swap_back(swapped)
    assert [type(norm) for norm in back.norms] == [nnx.BatchNorm] * 2
    zoo.assert_trees_equal(nnx.to_pure_dict(nnx.state(back)), nnx.to_pure_dict(nnx.state(model)))
    assert [type(norm) for norm in model.norms] == [nnx.BatchNorm] * 2  # the one that was given stays as it is


def test_a_layer_in_two_places_stays_one():
    swapped = tools.swap(Twice())
    assert swapped.first is swapped.held[0]
    swapped.train()
    swapped(jnp.arange(12.0).reshape(4, 3))
    assert float(jnp.abs(swapped.first.mean[...]).max()) > 0


def test_linen_over_a_named_axis():
    """Checks parts of a batch that share statistics in a network that knows of no axis, against the whole batch."""
    model, variables = zoo.linen_net(norm=nn.BatchNorm)
    x = zoo.images()

    def part(x):
        with tools.swapped_norms(axis_name="parts"):
            return model.apply(variables, x, train=True, mutable=["batch_stats"])

    y, updates = jax.vmap(part, axis_name="parts", out_axes=(0, None))(x.reshape(2, 4, *x.shape[1:]))
    wanted, wanted_updates = model.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(y.reshape(wanted.shape), wanted, atol=TOLERANCE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=TOLERANCE), updates, wanted_updates)


class Copied(nn.Module):
    """A copy of Flax's layer, as some packages have one."""

    use_running_average: bool
    momentum: float = 0.99
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x, mask=None):
        average, features = self.use_running_average, x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, features)
        var = self.variable("batch_stats", "var", jnp.ones, features)
        scale = self.param("scale", nn.initializers.ones, features)
        bias = self.param("bias", nn.initializers.zeros, features)
        axes = tuple(range(x.ndim - 1))
        m, v = (mean.value, var.value) if average else (x.mean(axes), x.var(axes))
        if not average and not self.is_initializing():
            mean.value, var.value = (
                self.momentum * old.value + (1 - self.momentum) * new for old, new in ((mean, m), (var, v))
            )
        m, v, scale, bias = (jnp.expand_dims(a, axes) for a in (m, v, scale, bias))
        return (x - m) / jnp.sqrt(v + self.epsilon) * scale + bias


def test_a_copy_of_the_layer():
    """Checks that a class that is said to compute the same is swapped, and that otherwise its presence is an error."""
    model, variables = zoo.linen_net(norm=Copied)
    x = zoo.images()

    def step(x):
        return model.apply(variables, x, train=True, mutable=["batch_stats"])

    message = r"Copied_0: Copied holds .* swapped_norms\(copies=\[Copied\]\)"
    with pytest.raises(ValueError, match=message), tools.swapped_norms():
        step(x)
    wanted = step(x)
    with tools.swapped_norms(copies=[Copied], axis_name="parts"):
        parts = jax.vmap(step, axis_name="parts", out_axes=(0, None))(x.reshape(2, 4, *x.shape[1:]))
    close = lambda a, b: np.testing.assert_allclose(a.reshape(b.shape), b, atol=TOLERANCE)  # noqa: E731
    jax.tree.map(close, parts, wanted)
    with pytest.raises(TypeError, match="copies must hold classes of linen modules"), tools.swapped_norms(copies=["x"]):
        pass


class Own(nnx.BatchNorm):
    def __call__(self, x):
        return 2 * super().__call__(x)


def test_errors():
    rngs = nnx.Rngs(0)
    with pytest.raises(ValueError, match=r"subclasses of flax\.nnx\.BatchNorm with a __call__ of their own"):
        tools.swap(Own(3, rngs=rngs))
    with pytest.raises(ValueError, match=r"holds no flax\.nnx\.BatchNorm"):
        tools.swap(nnx.Linear(3, 4, rngs=rngs))
    with pytest.raises(ValueError, match=r"fields must be some of .*got \['axes'\]"):
        tools.swap(nnx.BatchNorm(3, rngs=rngs), axes=1)
    with pytest.raises(TypeError, match="must be an nnx module"):
        tools.swap(nn.BatchNorm())
