"""Tests where frozen_norms holds: in one thread, until it is left in whatever order, and never in code that pauses."""

import asyncio
import contextlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
from bnjax import tools
from tests.support import zoo

NORM, X = bnjax.linen.BatchNorm(use_running_average=False), jnp.array([[4.0], [6.0]])
VARIABLES = NORM.init(jax.random.key(0), X)


def is_frozen():
    """Returns whether the layer leaves x as it is, by its statistics 0 and 1."""
    y, _ = NORM.apply(VARIABLES, X, mutable=["batch_stats"])
    return bool(np.allclose(y, X, atol=1e-3))


async def in_a_coroutine():
    with tools.frozen_norms():
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def asynchronous():
    with tools.frozen_norms():
        yield


async def by_an_asynchronous_context():
    async with asynchronous():
        await asyncio.sleep(0)


async def by_a_stack():
    with contextlib.ExitStack() as stack:
        stack.enter_context(tools.frozen_norms())
        await asyncio.sleep(0)


def in_a_generator():
    with tools.frozen_norms():
        yield


PAUSING = {
    "coroutine": lambda: asyncio.run(in_a_coroutine()),
    "asynchronous context": lambda: asyncio.run(by_an_asynchronous_context()),
    "stack": lambda: asyncio.run(by_a_stack()),
    "generator": lambda: next(in_a_generator()),
    "generator expression": lambda: next(tools.frozen_norms().__enter__() for _ in range(1)),
}


@pytest.mark.parametrize("name", PAUSING)
def test_code_that_pauses_is_refused(name):
    with pytest.raises(RuntimeError, match=r"frozen_norms was entered in .*, a coroutine or a generator"):
        PAUSING[name]()
    assert not is_frozen()


def test_left_in_another_order():
    first, second = tools.frozen_norms(), tools.frozen_norms()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert is_frozen()
    second.__exit__(None, None, None)
    assert not is_frozen()


def test_other_threads_are_not_frozen():
    found = []
    with tools.frozen_norms():
        thread = threading.Thread(target=lambda: found.append(is_frozen()))
        thread.start()
        thread.join()
        assert is_frozen()
    assert found == [False]


def test_as_a_decorator():
    frozen = tools.frozen_norms()(is_frozen)
    assert frozen() and frozen() and not is_frozen()


def test_no_layers():
    with pytest.raises(ValueError, match="layers is empty"), tools.frozen_norms(layers=[]):
        pass


@pytest.mark.parametrize("norm", zoo.LINEN_NORMS)
@pytest.mark.parametrize("jitted_first", [False, True])
def test_frozen_norms(norm, jitted_first):
    """Checks evaluation inside the context and training outside it, whatever jit has cached before."""
    model, variables = zoo.linen_net(norm=norm)
    train = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))
    x = zoo.images(3)
    if jitted_first:
        train(variables, x)
    with tools.frozen_norms():
        y, updates = train(variables, x)
    np.testing.assert_allclose(y, model.apply(variables, x), rtol=1e-5, atol=1e-5)
    zoo.assert_trees_equal(updates["batch_stats"], variables["batch_stats"])
    with tools.frozen_norms(layers=["BatchNorm_0"]):
        _, some = train(variables, x)
    _, none = train(variables, x)
    zoo.assert_trees_equal(some["batch_stats"]["BatchNorm_0"], variables["batch_stats"]["BatchNorm_0"])
    for thawed in (some["batch_stats"]["BatchNorm_1"], none["batch_stats"]["BatchNorm_0"]):
        assert not any(
            np.array_equal(a, b) for a in thawed.values() for b in variables["batch_stats"]["BatchNorm_0"].values()
        )
    with pytest.raises(ValueError, match="sequence of patterns"), tools.frozen_norms("BatchNorm_0"):
        pass


def test_frozen_norms_inside_scan_and_vmap():
    model, variables = zoo.linen_net(zoo.Nested)
    x = zoo.images()
    with tools.frozen_norms():
        y, updates = model.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(y, model.apply(variables, x), rtol=1e-5, atol=1e-5)
    zoo.assert_trees_equal(updates["batch_stats"], variables["batch_stats"])
