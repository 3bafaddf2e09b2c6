"""What the compiled program of one layer consists of, counted, so that nothing comes back unseen."""

import re

import chex
import jax
import jax.numpy as jnp
import pytest

import bnjax

SHAPES = {"float32": (32, 28, 28, 64), "bfloat16": (32, 28, 28, 64)}


def _layer(x, scale, bias, mask):
    return bnjax.batch_norm(x, scale, bias, mask=mask, dtype=x.dtype)[0]


def _gradient(x, scale, bias, dy, mask):
    y, pull = jax.vjp(lambda *a: _layer(*a, mask), x, scale, bias)
    return y, pull(dy)


def _compile(f, dtype, masked):
    x, vector = jnp.zeros(SHAPES[dtype], dtype), jnp.ones(64)
    mask = jnp.ones((32, 28, 28, 1), bool) if masked else None
    arrays = (x, vector, vector, mask) if f is _layer else (x, vector, vector, x, mask)
    return jax.jit(f).lower(*arrays)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("f", [_layer, _gradient])
@pytest.mark.parametrize("dtype", SHAPES)
def test_one_conditional(f, dtype, masked):
    """Checks that a layer has one branch, the guard's, forward and none backward, on every platform alike."""
    lowered = _compile(f, dtype, masked)
    assert len(re.findall(r"stablehlo\.case|stablehlo\.if", lowered.as_text())) == 1
    assert len(re.findall(r" conditional\(", lowered.compile().as_text())) <= 1


def test_passes_over_memory():
    """Checks XLA's count of bytes, forward and backward: flax.linen's layer moves 15 activations, this one fewer.

    Of the 14 here the branch of the guard, which rarely runs, counts for four or five.
    """
    cost = _compile(_gradient, "float32", False).compile().cost_analysis()
    size = 4 * 32 * 28 * 28 * 64
    assert cost["bytes accessed"] <= 14.1 * size


@pytest.mark.parametrize(("f", "most"), [(_layer, 12), (_gradient, 18)])
def test_a_small_layer_is_few_programs(f, most):
    """Checks how many loops, sums and conditionals XLA:CPU runs one after the other: each costs a small layer time."""
    text = _compile(f, "float32", False).compile().as_text()
    names = re.findall(r" = [^=]*? (fusion|conditional|reduce|convert|copy|call)\(", text[text.index("ENTRY") :])
    assert len(names) <= most, names


def test_layers_of_one_shape_are_traced_once():
    """Checks that a network traces the core once for each shape, however many layers have it."""
    traced = chex.assert_max_traces(lambda x: bnjax.batch_norm(x)[0], n=1)
    f = jax.jit(traced)
    for _ in range(3):
        f(jnp.ones((4, 3)))
    text = jax.jit(lambda x: bnjax.batch_norm(bnjax.batch_norm(x)[0])[0]).lower(jnp.ones((4, 3))).as_text()
    assert len(re.findall(r"func\.func private @normalize_batch", text)) == 1
