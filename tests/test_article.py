"""The ports of the article's two programs make the step that the originals make, from the same weights and batch."""

import functools
import importlib.util
import os
import runpy
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import bnjax
from bnjax import tools
from experiments import article
from experiments.train import devices
from experiments.train.loop import as_float, create_state, losses, make_train_step, place

FIXTURES = Path(__file__).with_name("fixtures")
WIDTHS, UNITS = (8, 16), 32
PORTS = {"keras": article.keras_port(WIDTHS, UNITS), "torch": article.torch_port(WIDTHS, UNITS)}
# Biases that the next normalization takes away again: their gradient is zero but for rounding, which Adam's first step,
# about η·g/|g|, makes a step of any size. It changes nothing in the output.
IDLE = {"keras": ("cnn/conv1/bias", "cnn/conv2/bias", "cnn/fc1/bias"), "torch": ("conv1.bias", "conv2.bias")}


def recorded(kind):
    return tools.read_arrays(FIXTURES / f"article_{kind}.npz")


def live(kind):
    """The reference computed now; its step is the recorded one."""
    os.environ["KERAS_BACKEND"] = "jax"
    with jax.numpy_rank_promotion("allow"):
        return runpy.run_path(str(FIXTURES / f"make_article_{kind}.py"))["reference"]()


SOURCES = [(kind, recorded) for kind in PORTS] + [(k, live) for k in PORTS if importlib.util.find_spec(k)]


@pytest.fixture(params=SOURCES, ids=[f"{kind}-{source.__name__}" for kind, source in SOURCES])
def step(request):
    """The original's step and the port's: kind, reference, its parts, and the same of the port by the same names."""
    return both_steps(*request.param)


@functools.cache
def both_steps(kind, source):
    arrays, port = source(kind), PORTS[kind]
    parts = {part: values(arrays, part) for part in ("before", "grad", "after")}
    return kind, arrays, parts, one_step(port, port.load(parts["before"]), arrays, PORTS[kind].save)


def values(arrays, part):
    return {name.removeprefix(f"{part}."): value for name, value in arrays.items() if name.startswith(f"{part}.")}


def one_step(port, variables, batch, back):
    """Loss, gradients, and all that there is after the step."""

    def objective(params):
        logits, updates = port.model.apply(
            {**variables, "params": params}, as_float(batch), train=True, mutable=["batch_stats"]
        )
        return losses(logits, batch).mean(), updates["batch_stats"]

    params = variables["params"]
    (loss, stats), grads = jax.value_and_grad(objective, has_aux=True)(params)
    updates, _ = port.optimizer.update(grads, port.optimizer.init(params), params)
    after = {"params": optax.apply_updates(params, updates), "batch_stats": stats}
    return dict(loss=loss, grad=back({**variables, "params": grads}), after=back(after))


def statistics(name):
    return "moving" in name or "running" in name


def close(actual, wanted, atol, name):
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=atol, err_msg=name)


def test_loss_and_gradients(step):
    """Each gradient to 1e-5 of the largest in its module: of the kernel's for idle biases, which are but rounding."""
    kind, arrays, parts, port = step
    close(port["loss"], arrays["loss"], 1e-6, "loss")
    for name, wanted in parts["grad"].items():
        module = name.removesuffix("bias").removesuffix("kernel").removesuffix("weight")
        largest = max(np.abs(g).max() for other, g in parts["grad"].items() if other.startswith(module))
        close(port["grad"][name], wanted, 1e-5 * largest, name)
        if name in IDLE[kind]:
            assert np.abs(wanted).max() < 1e-5 * largest


def test_statistics_after_the_step(step):
    _, _, parts, port = step
    names = [name for name in parts["after"] if statistics(name)]
    assert len(names) in (4, 6)
    for name in names:
        assert np.abs(parts["after"][name] - parts["before"][name]).max() > 1e-3  # they did move
        close(port["after"][name], parts["after"][name], 1e-5, name)


def test_parameters_after_the_step(step):
    """To 1e-5 of values that Adam moves by up to 1e-3.

    A step η·g/(|g| + ε) differs by η·ε·Δg/(|g| + ε)²: with Δg of some 1e-7 that is below 1e-5 wherever |g| exceeds
    6e-6 for Keras (whose ε counts as 3e-6 in the first step) and 3e-7 for PyTorch. No gradient here is nearer to
    zero, but for those of the idle biases and of units that no image reaches (0 in both).
    """
    kind, _, parts, port = step
    compared = [name for name in parts["grad"] if name not in IDLE[kind]]
    assert len(compared) == len(parts["grad"]) - len(IDLE[kind])
    for name in compared:
        assert np.abs(parts["after"][name] - parts["before"][name]).max() > 9e-4
        close(port["after"][name], parts["after"][name], 1e-5, name)


def test_the_optimizer_by_the_originals_gradients(step):
    """From the very same gradients every parameter, the idle biases among them, ends where the original's does."""
    kind, _, parts, _ = step
    port = PORTS[kind]
    variables = port.load(parts["before"])
    # the statistics are there for the converter's sake
    grads = port.load({**parts["before"], **parts["grad"]})["params"]
    updates, _ = port.optimizer.update(grads, port.optimizer.init(variables["params"]), variables["params"])
    after = PORTS[kind].save({**variables, "params": optax.apply_updates(variables["params"], updates)})
    for name in parts["grad"]:
        close(after[name], parts["after"][name], 1e-6, name)


def test_optax_adam_is_not_keras_adam():
    """Why the port brings its own: a gradient of 1e-6 moves a weight by 0.91 η in one and by 0.24 η in the other."""
    moved = []
    for optimizer in (optax.adam(1e-3, eps=1e-7), article.keras_adam()):
        updates, _ = optimizer.update(np.float32(1e-6), optimizer.init(np.float32(0)))
        moved.append(float(updates) / -1e-3)
    np.testing.assert_allclose(moved, [1e-6 / (1e-6 + 1e-7), 1e-6 / (1e-6 + 1e-7 / np.sqrt(1 - 0.999))], rtol=1e-3)


def test_the_shape_error_of_the_original():
    """in_features of the usual misprint, 7 · 7 positions: refused with the two numbers, where 5 · 5 are right."""
    state = values(recorded("torch"), "before")
    printed = {**state, "fc1.weight": np.zeros((UNITS, WIDTHS[-1] * 7 * 7), np.float32)}
    with pytest.raises(ValueError, match=r"fc1.weight reads 784 inputs .* flattened=\(16, 5, 5\) makes 400"):
        PORTS["torch"].load(printed)
    assert state["fc1.weight"].shape == (UNITS, WIDTHS[-1] * article.POOLED**2)


if importlib.util.find_spec("torch"):

    def test_the_shape_error_in_pytorch():
        import torch

        from experiments.article_torch import AS_PRINTED, CNN

        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            CNN(pooled=AS_PRINTED)(torch.zeros(2, 1, 28, 28))
        assert CNN()(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.slow
@pytest.mark.parametrize("kind", PORTS)
def test_the_shared_loop_trains_them(kind):
    """As they are: the loss of one batch falls over a few steps, and the statistics move."""
    port, mesh, arrays = PORTS[kind], devices.data_mesh(1), recorded(kind)
    batch = place({name: arrays[name] for name in ("image", "label")}, mesh)
    train = make_train_step(port.model, port.optimizer, mesh, "jit", lambda *_: {})
    state = create_state(port.model, port.optimizer, 0, mesh)
    found = []
    for _ in range(5):
        state, metrics = train(state, batch)
        found.append(float(metrics["loss"]))
    assert found[-1] < 0.7 * found[0]
    assert all(np.any(layer["mean"]) for layer in state.batch_stats.values())


def test_the_originals_sizes():
    """As an article has them: 32 and 64 filters, 128 units; and another normalization where a comparison wants it."""
    for port in (article.keras_port(), article.torch_port()):
        shapes = jax.eval_shape(lambda p=port: p.model.init(jax.random.key(0), np.zeros((1, 28, 28, 1)), train=False))
        assert shapes["params"]["fc1"]["kernel"].shape == (1600, 128)
        assert shapes["params"]["fc2"]["kernel"].shape == (128, 10)
    other = article.TorchNet(WIDTHS, UNITS, norm=bnjax.linen.FrozenBatchNorm)
    assert other.init(jax.random.key(0), np.zeros((1, 28, 28, 1)), train=True)["batch_stats"].keys() == {"bn1", "bn2"}
