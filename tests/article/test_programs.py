"""The ports of the article's two programs make the steps that the originals make, from the same weights and digits."""

import functools
import importlib.util
import os
import runpy
from itertools import islice
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from bnjax import tools
from experiments import jsonl
from experiments.article import keras_port, keras_program, torch_port, torch_program, training
from experiments.data.images import all_digits
from experiments.train.loop import losses
from tests.support.programs import finish, start

FIXTURES = Path(__file__).parents[1] / "fixtures"
PORTS = {"keras": keras_port, "torch": torch_port}
PROGRAMS = {"keras": keras_program, "torch": torch_program}
# A bias that the next normalization takes away again: its gradient is zero but for rounding, which Adam's first step,
# about η·g/|g|, makes a step of any size. The Keras program has a ReLU between its bias and the normalization.
IDLE = {"keras": (), "torch": ("conv.bias",)}


def recorded(kind):
    return tools.read_arrays(FIXTURES / f"article_{kind}.npz")


def live(kind):
    """The reference computed now: the first 20 steps of Keras, the first of PyTorch."""
    os.environ["KERAS_BACKEND"] = "jax"
    with jax.numpy_rank_promotion("allow"):
        make = runpy.run_path(str(FIXTURES / f"make_article_{kind}.py"))["reference"]
        return make(steps=20 if kind == "keras" else 1)


SOURCES = [(kind, recorded) for kind in PORTS] + [(k, live) for k in PORTS if importlib.util.find_spec(k)]


@pytest.fixture(params=SOURCES, ids=[f"{kind}-{source.__name__}" for kind, source in SOURCES])
def step(request):
    """The first step of both: kind, arrays, the original's parts, and the port's by the same names."""
    return first_steps(*request.param)


@functools.cache
def first_steps(kind, source):
    arrays, port = source(kind), PORTS[kind]
    parts = {part: values(arrays, part) for part in ("before", "grad", "after")}
    return kind, arrays, parts, first_step(port, port.load(parts["before"]), *next(batches(kind, arrays)))


def values(arrays, part):
    return {name.removeprefix(f"{part}."): value for name, value in arrays.items() if name.startswith(f"{part}.")}


def batches(kind, arrays):
    """Images between 0 and 1 and labels, as the original had them: batches of 32, or all 5,000 again and again."""
    digits = all_digits()
    images = digits.images / np.float32(255)
    for number in range(len(arrays["losses"])):
        rows = arrays["order"][32 * number : 32 * (number + 1)] if kind == "keras" else slice(None)
        yield images[rows], digits.labels[rows]


def first_step(port, variables, images, labels):
    """Loss, gradients, and all that there is after the step."""

    def objective(params, images, labels):
        variables_ = {**variables, "params": params}
        logits, updates = port.MODEL.apply(variables_, images, train=True, mutable=["batch_stats"])
        return losses(logits, {"label": labels}).mean(), updates["batch_stats"]

    params = variables["params"]
    (loss, stats), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(params, images, labels)
    updates, _ = port.OPTIMIZER.update(grads, port.OPTIMIZER.init(params), params)
    after = {"params": optax.apply_updates(params, updates), "batch_stats": stats}
    return dict(loss=loss, grad=port.save({**variables, "params": grads}), after=port.save(after))


def close(actual, wanted, atol, name):
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=atol, err_msg=name)


@pytest.mark.slow
def test_loss_and_gradients(step):
    """Each gradient to 1e-5 of the largest in its layer; PyTorch's in float64, since its float32 sums are 2e-4 off."""
    kind, arrays, parts, port = step
    close(port["loss"], arrays["losses"][0], 1e-6, "loss")
    gradients = values(arrays, "exact") or parts["grad"]
    assert gradients.keys() == parts["grad"].keys()
    for name, wanted in gradients.items():
        layer = name.replace(".", "/").rpartition("/")[0]
        largest = max(np.abs(g).max() for other, g in gradients.items() if other.startswith(layer))
        close(port["grad"][name], wanted, 1e-5 * largest, name)
        assert (np.abs(wanted).max() < 1e-5 * largest) == (name in IDLE[kind])


def test_statistics_after_the_step(step):
    _, _, parts, port = step
    names = [name for name in parts["after"] if "moving" in name or "running" in name]
    assert len(names) == 2
    for name in names:
        assert np.abs(parts["after"][name] - parts["before"][name]).max() > 1e-4  # they did move
        close(port["after"][name], parts["after"][name], 1e-6, name)


def test_parameters_after_the_step(step):
    """To 1e-5 of values that Adam moves by up to 1e-3.

    A step η·g/(|g| + ε) differs by η·ε·Δg/(|g| + ε)² where g differs by Δg, and by 2η where g changes sign. Keras's ε
    counts as 3e-6 in the first step: with Δg = 1e-8 it stays below 4e-6. PyTorch's ε is 1e-8 and its smallest gradient
    1e-6, where Δg = 2e-7 makes 2e-6.
    """
    kind, _, parts, port = step
    compared = [name for name in parts["grad"] if name not in IDLE[kind]]
    assert len(compared) == len(parts["grad"]) - len(IDLE[kind])
    for name in compared:
        assert np.abs(parts["after"][name] - parts["before"][name]).max() > 9e-4
        close(port["after"][name], parts["after"][name], 1e-5, name)


def test_the_optimizer_by_the_originals_gradients(step):
    """From the very same gradients every parameter, the idle bias among them, ends where the original's does."""
    kind, _, parts, _ = step
    port = PORTS[kind]
    variables = port.load(parts["before"])
    grads = port.load({**parts["before"], **parts["grad"]})["params"]  # statistics, for the converter's sake
    updates, _ = port.OPTIMIZER.update(grads, port.OPTIMIZER.init(variables["params"]), variables["params"])
    after = port.save({**variables, "params": optax.apply_updates(variables["params"], updates)})
    for name in parts["grad"]:
        close(after[name], parts["after"][name], 1e-6, name)


@pytest.mark.parametrize(
    ("kind", "source", "steps"),
    [
        ("keras", recorded, 20),
        pytest.param("keras", recorded, 157, marks=pytest.mark.slow),  # one epoch
        pytest.param("torch", recorded, 20, marks=pytest.mark.slow),
        *((kind, source, 20 if kind == "keras" else 1) for kind, source in SOURCES if source is live),
    ],
)
def test_losses(kind, source, steps):
    """In float32 to 1e-5, step after step: Keras's over all 5,000 digits in 157, PyTorch's over all of them in each."""
    _, arrays, parts, _ = first_steps(kind, source)
    variables = PORTS[kind].load(parts["before"])
    port = training.Port(PORTS[kind], seed=0)
    port.state = port.state._replace(**variables)
    found = [port.step(*batch) for batch in islice(batches(kind, arrays), steps)]
    close(found, arrays["losses"][:steps], training.TOLERANCE, "losses")
    assert steps == 1 or found[-1] < 0.5 * found[0]


def test_optax_adam_is_not_keras_adam():
    """Why the port brings its own: a gradient of 1e-6 moves a weight by 0.91 η in one and by 0.24 η in the other."""
    moved = []
    for optimizer in (optax.adam(1e-3, eps=1e-7), keras_port.keras_adam()):
        updates, _ = optimizer.update(np.float32(1e-6), optimizer.init(np.float32(0)))
        moved.append(float(updates) / -1e-3)
    np.testing.assert_allclose(moved, [1e-6 / (1e-6 + 1e-7), 1e-6 / (1e-6 + 1e-7 / np.sqrt(1 - 0.999))], rtol=1e-3)


@pytest.mark.parametrize("kind", PORTS)
def test_initial_weights(kind):
    """The port draws its own from the distributions of the original: the same shapes, bounds and deviations."""
    drawn = PORTS[kind].save(PORTS[kind].MODEL.init(jax.random.key(1), np.zeros((1, 28, 28, 1)), train=False))
    for name, wanted in values(recorded(kind), "before").items():
        found, spread = drawn[name], np.std(wanted)
        assert found.shape == wanted.shape
        close(np.mean(found), np.mean(wanted), 6 * spread / max(wanted.size, 1) ** 0.5 + 1e-6, name)
        if wanted.size > 5_000:  # enough to know the deviation and the bounds
            close(np.std(found), spread, 0.02 * spread, name)
            close(np.abs(found).max(), np.abs(wanted).max(), 0.01 * np.abs(wanted).max(), name)


def test_the_idle_bias_moves_nothing_but_the_running_mean():
    """Whatever it is, training sees the same numbers; evaluation trails it by the momentum."""
    variables = torch_port.load(values(recorded("torch"), "before"))
    images = all_digits().images[::100] / np.float32(255)
    moved = jax.tree.map_with_path(
        lambda path, v: v + 1 if jax.tree_util.keystr(path).endswith("['conv']['bias']") else v, variables
    )
    found = [torch_port.MODEL.apply(v, images, train=True, mutable=["batch_stats"]) for v in (variables, moved)]
    close(found[1][0], found[0][0], 1e-5, "logits")
    means = [updates["batch_stats"]["bn"]["mean"] for _, updates in found]
    close(means[1] - means[0], 0.1, 1e-6, "PyTorch's momentum times the shift")


@pytest.mark.parametrize("kind", PROGRAMS)
def test_the_committed_tables_are_those_of_the_committed_lines(kind):
    program = PROGRAMS[kind]
    file = Path(program.__file__).parent / "results" / f"{program.STUDY.name}.jsonl"
    lines = jsonl.read(file)
    assert len({line["seed"] for line in lines}) >= 5
    assert {line["setting"] for line in lines} == set(program.SETTINGS)  # the originals among them
    assert file.with_suffix(".md").read_text().strip() == program.STUDY.table(lines)
    assert training.verdict(lines, program.PORT, program.ORIGINAL).startswith("**holds**")


def test_the_verdict_is_a_rule():
    def lines(setting, losses):
        return [{"setting": setting, "seed": 0, "step": n, "loss": loss} for n, loss in enumerate(losses)]

    assert training.verdict(lines("a", [1, 0.5]) + lines("b", [1, 0.500005]), "a", "b").startswith("**holds**")
    assert training.verdict(lines("a", [1, 0.5]) + lines("b", [1, 0.50002]), "a", "b").startswith("**does not hold**")
    assert training.verdict(lines("a", [1, 0.5]), "a", "b").startswith("not compared")


@pytest.mark.slow
@pytest.mark.parametrize("kind", PROGRAMS)
def test_smoke(kind, tmp_path):
    """As a program, into a picture and a table; an original takes part where its library is installed."""
    program = PROGRAMS[kind]
    out = finish(start("--smoke", "--out", tmp_path, module=program.__name__))
    file = tmp_path / "smoke" / f"{program.STUDY.name}.jsonl"
    lines = jsonl.read(file)
    assert {line["setting"] for line in lines} == set(program.RUNNABLE)
    assert program.STUDY.table(lines) in out
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
