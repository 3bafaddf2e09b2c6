"""What the two programs share: a port that trains as its original does, a trial of either, table and picture."""

from collections.abc import Iterator
from types import ModuleType
from typing import Any, Protocol

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments.data.images import Splits, all_digits, embedded_digits, stratified_split
from experiments.data.pipeline import training_batches
from experiments.repro.study import Config, Line, band, curves, spread
from experiments.train import devices
from experiments.train.loop import TrainState, create_state, make_train_step, place

COMPARED = 20  # steps from the same weights whose losses a port and its original must have in common ...
TOLERANCE = 1e-5  # ... to this, in float32


class Trained(Protocol):
    """An original or a port."""

    def step(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Trains on images `[N, 28, 28, 1]` float and labels `[N]`. Returns the loss before the step."""
        ...

    def logits(self, images: np.ndarray, train: bool = False) -> np.ndarray:
        """Returns the logits `[N, 10]`, in training mode without touching the running averages."""
        ...


class Port:
    """A port that trains in the loop of `experiments.train`, as any other model there."""

    def __init__(self, module: ModuleType, seed: int):
        """module: `keras_port` or `torch_port`; seed: of the weights."""
        mesh = devices.data_mesh(1)
        self.model, self.state = module.MODEL, create_state(module.MODEL, module.OPTIMIZER, seed, mesh)
        self._place = lambda batch: place(batch, mesh)
        self._step = make_train_step(module.MODEL, module.OPTIMIZER, mesh, "jit", lambda state, stats: {}, as_they_are)
        self._apply = jax.jit(self.model.apply, static_argnames=("train", "mutable"))

    def step(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Trains on images `[N, 28, 28, 1]` float and labels `[N]`. Returns the loss before the step."""
        self.last_images = images
        self.state, metrics = self._step(self.state, self._place({"image": images, "label": labels}))
        return float(metrics["loss"])

    def logits(self, images: np.ndarray, train: bool = False, batch_stats: Any = None) -> np.ndarray:
        """Returns the logits `[N, 10]`, in evaluation mode by the running averages or by `batch_stats`."""
        variables = variables_of(self.state, batch_stats)
        return np.asarray(self._apply(variables, images, train=train, mutable=("batch_stats",))[0])


def as_they_are(batch: Any) -> tuple[Any]:
    """Returns what a model is called with for a batch whose images are between 0 and 1 already."""
    return (batch["image"],)


def digits(config: Config) -> Splits:
    """Returns the 4,000 digits for training and the 1,000 held back; for a smoke run 200 of them for both."""
    few = stratified_split(all_digits(), 20).test
    return config.pick(embedded_digits(), Splits(few, few))


def variables_of(state: TrainState, batch_stats: Any = None) -> dict[str, Any]:
    """Returns the variables of a state, with other statistics where they are given."""
    return {"params": state.params, "batch_stats": state.batch_stats if batch_stats is None else batch_stats}


def train(trained: Trained, data: Splits, epochs: int, batch_size: int | None, seed: int) -> Iterator[Line]:
    """Trains in batches or, where `batch_size` is None, on all digits at once.

    Yields:
        The loss of each of the first steps; and after each epoch the mean loss over it and the accuracy on the test
        digits, in evaluation mode (by the running averages) and in training mode (by their own statistics).
    """
    losses: list[float] = []
    batch_size = batch_size or len(data.train.labels)
    per_epoch = len(data.train.labels) // batch_size
    test = data.test.images / np.float32(255)

    def accuracy(**mode: Any) -> float:
        return float((trained.logits(test, **mode).argmax(-1) == data.test.labels).mean())

    for number, batch in enumerate(training_batches(data.train, batch_size, epochs, seed=seed, max_shift=0), start=1):
        losses.append(trained.step(batch["image"] / np.float32(255), batch["label"]))
        if number <= COMPARED:
            yield {"kind": "step", "step": number, "loss": losses[-1]}
        if number % per_epoch == 0:
            line = {"kind": "epoch", "epoch": number // per_epoch, "mean loss": float(np.mean(losses[-per_epoch:]))}
            yield {**line, "accuracy": accuracy(), "accuracy, training mode": accuracy(train=True)}


def apart(lines: list[Line], port: str, original: str) -> np.ndarray | None:
    """Returns how far the first losses lie apart, `[seeds, steps]`; None where the original did not run."""
    if not any(line["setting"] == original for line in lines):
        return None
    losses = [curves(lines, setting, "step", "loss")[1] for setting in (port, original)]
    return np.abs(losses[0] - losses[1])


def verdict(lines: list[Line], port: str, original: str) -> str:
    """Returns whether the port makes the steps of its original, in words."""
    found = apart(lines, port, original)
    if found is None:
        return "not compared: the original's library is not installed"
    holds = "holds" if found.max() <= TOLERANCE else "does not hold"
    apart_by = f"Over the first {found.shape[1]} steps the losses differ by {found.max():.1e} at most"
    return f"**{holds}**, {len(found)} seeds. {apart_by}"


def table(lines: list[Line], settings: dict[str, Any], port: str, original: str) -> str:
    """Returns the verdict, and the accuracy of each setting at its end."""
    names = "mean loss", "accuracy", "accuracy, training mode"
    heading = "loss in the last epoch", "test accuracy, %", "by the test batch's own statistics, %"
    text = [f"{verdict(lines, port, original)}.", ""]
    text += [f"| | {' | '.join(heading)} |", "|---" * 4 + "|"]
    for setting in [s for s in settings if any(line["setting"] == s for line in lines)]:
        loss, *accuracies = (curves(lines, setting, "epoch", name)[1][:, -1] for name in names)
        text.append(f"| {setting} | {' | '.join([spread(loss), *(spread(100 * a, 1) for a in accuracies)])} |")
    return "\n".join(text)


def draw(lines: list[Line], figure: Figure, settings: dict[str, Any], port: str, original: str) -> None:
    """Draws the first losses of both, and the accuracy by epoch of every setting."""
    losses, accuracy = figure.subplots(1, 2)
    for setting, style in ((port, "-"), (original, "--")):
        if any(line["setting"] == setting for line in lines):
            band(losses, *curves(lines, setting, "step", "loss"), label=setting, ls=style)
    losses.set(title="the first steps", xlabel="step", ylabel="loss")
    for setting in settings:
        if any(line["setting"] == setting for line in lines):
            epochs, values = curves(lines, setting, "epoch", "accuracy")
            band(accuracy, epochs, 100 * values, label=setting, ls="--" if setting == original else "-", marker="o")
    accuracy.set(title="1,000 held-back digits", xlabel="epoch", ylabel="test accuracy, %")
    for axes in (losses, accuracy):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
