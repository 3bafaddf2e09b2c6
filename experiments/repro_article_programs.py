"""The article's two programs as it has them, in Keras and in PyTorch, and ported to Flax, Optax and bnjax.

Claim:    Ported to bnjax the article's Keras and PyTorch programs learn what the originals learn, step for step.
Command:  python -m experiments.repro_article_programs           # --smoke: seconds
Hardware: 2 CPU cores
Time:     5 min of one core

Each original begins with the weights of its port and sees the same batches of 50 of the 4,000 digits, so that the two
curves should lie on each other until rounding has grown. The originals need `pip install "bnjax[peers]"`; without Keras
or PyTorch their rows are not there, and the table says so.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments import article
from experiments.data.images import Labelled, embedded_digits
from experiments.data.pipeline import training_batches
from experiments.repro import study
from experiments.train.devices import data_mesh
from experiments.train.loop import create_state

BATCH, EVERY = 50, 20
PORTS = {"Keras": article.keras_port, "PyTorch": article.torch_port}
INSTALLED = {"Keras": importlib.util.find_spec("keras"), "PyTorch": importlib.util.find_spec("torch")}
SMALL = ((4, 8), 16)  # filters and units of a smoke run
Original = tuple[Callable[[np.ndarray, np.ndarray], float], Callable[[Labelled], float]]  # (step -> loss, accuracy)


def original_keras(state: Any, size: Any) -> Original:
    """The Keras program with these weights: a training step and the accuracy."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    from experiments.article_keras import program

    model = program(*size)
    for weight in model.weights:
        weight.assign(state[weight.path])

    def step(images: np.ndarray, labels: np.ndarray) -> float:
        model.reset_metrics()  # train_on_batch gives the mean since then
        return float(model.train_on_batch(images, keras.utils.to_categorical(labels, 10))[0])

    def accuracy(data: Labelled) -> float:
        return float((model.predict_on_batch(data.images / np.float32(255)).argmax(-1) == data.labels).mean())

    return step, accuracy


def original_torch(state: Any, size: Any) -> Original:
    """The PyTorch program with these weights: a training step and the accuracy."""
    import torch

    from experiments.article_torch import CNN, training

    model = CNN(*size)
    model.load_state_dict({name: torch.tensor(np.asarray(value)) for name, value in state.items()})
    criterion, optimizer = training(model)

    def tensor(images: np.ndarray) -> torch.Tensor:
        return torch.tensor(images.transpose(0, 3, 1, 2))

    def step(images: np.ndarray, labels: np.ndarray) -> float:
        model.train()
        loss = criterion(model(tensor(images)), torch.tensor(labels.astype("int64")))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    def accuracy(data: Labelled) -> float:
        model.eval()
        with torch.no_grad():
            logits = model(tensor(data.images / np.float32(255))).numpy()
        return float((logits.argmax(-1) == data.labels).mean())

    return step, accuracy


ORIGINALS = {"Keras": original_keras, "PyTorch": original_torch}
SETTINGS = {f"{name}, ported": (name, True) for name in PORTS} | {f"{name}, original": (name, False) for name in PORTS}
RUNNABLE = [setting for setting, (name, ported) in SETTINGS.items() if ported or INSTALLED[name]]


def trial(setting: str, seed: int, config: study.Config) -> Iterator[study.Line]:
    """Loss and accuracy on the held-back digits."""
    name, ported = SETTINGS[setting]
    size = config.pick((), SMALL)
    port, steps = PORTS[name](*size), config.pick(400, 20, full=4_000)
    if ported:
        options = dict(steps=steps, every=EVERY, batch_size=BATCH, seed=seed)
        yield from (line for _, line in study.train(port.model, port.optimizer, embedded_digits(), **options))
        return
    state = create_state(port.model, port.optimizer, seed, data_mesh(1))
    weights = port.save({"params": state.params, "batch_stats": state.batch_stats})
    yield from train_original(*ORIGINALS[name](weights, size), steps, seed)


def train_original(step: Callable, accuracy: Callable, steps: int, seed: int) -> Iterator[study.Line]:
    """As `study.train` does."""
    data, rows = embedded_digits(), []
    batches = training_batches(data.train, BATCH, steps * BATCH // len(data.train.labels) + 1, seed=seed, max_shift=0)
    for number, batch in zip(range(1, steps + 1), batches, strict=False):
        rows.append(step(batch["image"] / np.float32(255), batch["label"]))
        if number % EVERY == 0 or number == steps:
            yield {"kind": "step", "step": number, "loss": np.mean(rows), "accuracy": accuracy(data.test)}
            rows = []


def table(lines: list[study.Line]) -> str:
    """Final accuracy; and the largest difference of a port's loss from the original's, early and over all."""
    text = ["| | accuracy at the end | largest difference of the loss from the original's, first line | all |"]
    text.append("|---|---|---|---|")
    ran = [setting for setting in SETTINGS if any(line["setting"] == setting for line in lines)]
    for setting in ran:
        name, ported = SETTINGS[setting]
        _, accuracy = study.curves(lines, setting, "step", "accuracy")
        cells = [study.spread(accuracy[:, -1]), "", ""]
        if ported and f"{name}, original" in ran:
            losses = [study.curves(lines, f"{name}, {which}", "step", "loss")[1] for which in ("ported", "original")]
            apart = np.abs(losses[0] - losses[1])
            cells[1:] = [f"{apart[:, 0].max():.1e}", f"{apart.max():.1e}"]
        text.append(f"| {setting} | {' | '.join(cells)} |")
    absent = [name for name in PORTS if f"{name}, original" not in ran]
    return "\n".join([*text, *([f"\nNot installed: {', '.join(absent)}."] if absent else [])])


def draw(lines: list[study.Line], figure: Figure) -> None:
    """The loss of each program beside that of its port."""
    for axes, name in zip(figure.subplots(1, 2, sharey=True), PORTS, strict=True):
        for which, style in (("ported", "-"), ("original", "--")):
            if any(line["setting"] == f"{name}, {which}" for line in lines):
                study.band(axes, *study.curves(lines, f"{name}, {which}", "step", "loss"), label=which, ls=style)
        axes.set(xlabel="training step", ylabel="training loss", yscale="log", title=f"the {name} program")
        axes.legend()


STUDY = study.Study("repro_article_programs", tuple(RUNNABLE), trial, table, draw)

if __name__ == "__main__":
    study.run(STUDY, __doc__)
