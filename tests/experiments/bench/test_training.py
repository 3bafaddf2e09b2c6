"""Tests that the networks of the training benchmark are equal, and that a conv-BN-ReLU block keeps two activations."""

import sys
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import jsonl
from experiments.bench import report
from experiments.bench.clock.training import __main__ as training
from experiments.bench.clock.training import imports, resnet20
from experiments.bench.clock.training import steps as training_steps
from experiments.bench.compiled import memory

BATCH = training_steps.batch_of(4, 8, resnet20.CLASSES)


@pytest.fixture(scope="module")
def nets():
    """Returns the network in every JAX library, in float64, so that real differences are far larger than rounding."""
    with jax.enable_x64(True):
        found = training_steps.jax_nets("resnet20", BATCH.images, jnp.float64, blocks=1)
        return {name: net._replace(params=_double(net.params), state=_double(net.state)) for name, net in found.items()}


def _double(tree):
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), tree)


@pytest.fixture(scope="module")
def after(nets):
    """Returns parameters, running averages, momentum and loss after a step in each library, as lists of arrays."""
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        steps = {name: jax.jit(training_steps.step_of(net)) for name, net in nets.items()}
        return {
            name: [jax.tree.leaves(part) for part in step(*training_steps.start_of(nets[name]), BATCH)]
            for name, step in steps.items()
        }


@pytest.mark.slow
@pytest.mark.parametrize("name", [*training_steps.LINEN, *training_steps.NNX])
def test_a_step_is_the_same_step(name, after):
    """Checks loss, gradients (the first momentum) and running averages; float64 loses four digits on the way."""
    for own, wanted in zip(after[name], after["bnjax"], strict=True):
        for a, b in zip(own, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-11 * max(1, np.max(np.abs(b))))


if find_spec("torch"):  # optional, also for the benchmark

    @pytest.mark.slow
    @pytest.mark.parametrize("name", training_steps.TORCH)
    def test_so_it_is_in_torch(name, nets, after):
        """Checks that a step in PyTorch gives the loss and parameters of bnjax, in both memory layouts."""
        net = resnet20.torch_resnet20(nets["bnjax"].params, blocks=1)
        loss = training_steps.torch_run(net, name, BATCH, jnp.float64)()
        params, _, _, (wanted,) = after["bnjax"]
        assert abs(loss - float(wanted)) < 1e-11
        with jax.enable_x64(True):
            tree = jax.tree.map(np.asarray, jax.tree.unflatten(jax.tree.structure(nets["bnjax"].params), params))
        for parameter, value in net.named_parameters():
            want = resnet20._torch_parameter(tree, parameter)
            np.testing.assert_allclose(value.detach().numpy(), want, rtol=0, atol=1e-11, err_msg=parameter)


@pytest.mark.slow
def test_the_step_that_is_timed_is_compiled_and_donates():
    net = training_steps.jax_nets("resnet20", BATCH.images, jnp.float32, blocks=1)["bnjax"]
    executable, *seconds = training_steps.compiled(net, BATCH)
    run = training_steps.jax_run(net, executable, BATCH)
    losses = [float(run()) for _ in range(3)]
    assert losses[2] < losses[0] and min(seconds) > 0
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(training_steps.start_of(net)))
    assert executable.memory_analysis().alias_size_in_bytes == size


def _of_one_block_more(norm):
    """Returns the memory per block between four and six blocks, without the copy of the kernel in its convolution."""
    deep, less = (memory.activations(norm, depth) for depth in (6, 4))
    *_, channels = shape = memory.SHAPES["cpu"]
    return (deep - less) / 2 - 9 * channels**2 / np.prod(shape)


def test_a_block_keeps_two_activations_on_the_cpu():
    """Checks that a block keeps its convolution's output and its own, with XLA:CPU's default scheduler; Flax keeps as
    many.
    """
    assert _of_one_block_more("bnjax") <= 2
    assert _of_one_block_more("flax.linen") >= 2


def test_the_tables():
    rows = [
        {"part": "step", "dtype": "float32", "peer": "bnjax", "milliseconds": 1.5, "parameters": 269722},
        {"part": "memory", "target": "cpu", "activations": [1.0, 2.5], "of_one_block_more": 1.5},
        {"part": "imports", "package": "flax", "milliseconds": 3.25},
    ]
    text = training.summary(rows)
    assert "| bnjax | 1.5 |" in text and "269,722" in text and "1.0, 2.5" in text and "| flax | 3.25 |" in text


def test_results_are_written(tmp_path):
    rows = [{"part": "imports", "package": "flax", "milliseconds": 3.25}]
    report.keep(rows, tmp_path, "clock.training", "Heading", training.summary(rows))
    about, row = jsonl.read(tmp_path / "training.jsonl")
    assert "jax" in about and row == rows[0]
    page = (tmp_path / "training.md").read_text()
    assert about["jax"] in page and "python -m experiments.bench.clock.training" in page and "| flax | 3.25 |" in page


@pytest.mark.slow
def test_an_import_loads_nothing_but_flax_and_its_own(tmp_path):
    """Checks that `import bnjax` loads no packages beyond those of flax.linen and flax.nnx: no plots,
    tables or data.
    """
    code = "import {}, sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    base, ours = (
        set(imports.printed(code.format(names), str(tmp_path)).split()) for names in ("flax.linen, flax.nnx", "bnjax")
    )
    assert ours - base - sys.stdlib_module_names == {"bnjax"}
