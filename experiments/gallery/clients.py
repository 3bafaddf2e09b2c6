"""Ten clients whose images differ: averaged statistics, merged statistics, and BN that stays at home (FedBN).

Claim:    Where clients differ, a network whose BN stays with each client is more accurate there than one whose BN is
          averaged; merged statistics are better than averaged ones.
Command:  python -m experiments.gallery.clients                 # --smoke: seconds
Hardware: 1 CPU core
Time:     9 min of one core

Li et al. 2021, https://arxiv.org/abs/2102.07623 (FedBN): the server averages everything but BN. Andreux et al. 2020,
https://arxiv.org/abs/2008.07424 (SiloBN): everything but the statistics. Each client has 400 of the digits for training
and 100 for testing, all corrupted in one way of its own (`experiments.data.corruptions`, strength 3). In each of 20
rounds every client takes 8 steps; then the server averages. `bnjax.tools.merge_stats` gives the statistics of all rows,
with the variance between the clients' means that an average of variances forgets.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from bnjax import tools
from bnjax.linen import BatchNorm
from experiments.data.corruptions import CORRUPTIONS, corrupt
from experiments.data.images import Labelled, all_digits
from experiments.gallery import RESULTS
from experiments.models.convolutional import StridedNet
from experiments.repro import study
from experiments.repro.claims import Claim, Measure, of

CLIENTS, TRAIN, BATCH, STRENGTH = len(CORRUPTIONS), 400, 50, 3
AVERAGED, MERGED, SILO, FED = (
    "averaged statistics",
    "merged statistics",
    "statistics at home (SiloBN)",
    "BN at home (FedBN)",
)
SETTINGS = (AVERAGED, MERGED, SILO, FED)


def clients() -> tuple[Labelled, Labelled]:
    """Returns the images `[clients, N, 28, 28, 1]` and labels of all clients, for training and for testing."""
    digits, rows = all_digits(), np.random.default_rng(0).permutation(5_000).reshape(CLIENTS, -1)
    images = np.stack([corrupt(digits.images[r], name, STRENGTH) for r, name in zip(rows, CORRUPTIONS, strict=True)])
    images, labels = images / np.float32(255), digits.labels[rows]
    return Labelled(images[:, :TRAIN], labels[:, :TRAIN]), Labelled(images[:, TRAIN:], labels[:, TRAIN:])


def everywhere(tree: Any) -> Any:
    """Returns the mean over the clients, the first axis, at every client."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf.mean(0), leaf.shape), tree)


def share(setting: str, params: Any, stats: Any) -> tuple[Any, Any]:
    """Returns parameters and statistics of the clients, `[clients, ...]`, after the server has averaged."""
    at_home = tools.affine_labels(params, stats) if setting == FED else jax.tree.map(lambda leaf: "rest", params)
    shared = jax.tree.map(
        lambda kind, own, mean: own if kind == "affine" else mean, at_home, params, everywhere(params)
    )
    if setting == AVERAGED:
        return shared, everywhere(stats)
    if setting == MERGED:
        merged = tools.merge_stats(stats, axis=0)
        return shared, jax.tree.map(lambda leaf, own: jnp.broadcast_to(leaf, own.shape), merged, stats)
    return shared, stats


def trial(setting: str, seed: int, config: study.Config) -> Iterator[study.Line]:
    """Trains the clients together; yields their test accuracy after each round."""
    (images, labels), test = clients()
    rounds, steps, rng = config.pick(20, 1), config.pick(8, 1), np.random.default_rng(seed)
    model = StridedNet(partial(BatchNorm, momentum=0.9), config.pick((8, 16, 32), (2, 4)))
    optimizer = optax.sgd(0.05)
    variables = model.init(jax.random.key(seed), jnp.zeros((1, 28, 28, 1)), train=False)
    params, stats = jax.tree.map(
        lambda leaf: jnp.stack([leaf] * CLIENTS), (variables["params"], variables["batch_stats"])
    )

    def step(carry: tuple[Any, Any], rows: jax.Array) -> tuple[tuple[Any, Any], None]:
        """Takes a step of every client on its rows, `[clients, N]`."""

        def of_client(params: Any, stats: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
            def loss(params: Any) -> tuple[jax.Array, Any]:
                variables = {"params": params, "batch_stats": stats}
                logits, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
                return losses.mean(), updates["batch_stats"]

            grads, new = jax.grad(loss, has_aux=True)(params)
            return optax.apply_updates(params, optimizer.update(grads, optimizer.init(params))[0]), new

        each = jnp.arange(CLIENTS)[:, None]
        return jax.vmap(of_client)(*carry, jnp.asarray(images)[each, rows], jnp.asarray(labels)[each, rows]), None

    local = jax.jit(lambda params, stats, rows: jax.lax.scan(step, (params, stats), rows)[0])

    @jax.jit
    def accuracy(params: Any, stats: Any) -> jax.Array:
        """Computes the test accuracy of every client, `[clients]`."""
        predict = jax.vmap(lambda p, s, x: model.apply({"params": p, "batch_stats": s}, x, train=False))
        return (predict(params, stats, test.images).argmax(-1) == test.labels).mean(1)

    for number in range(rounds):
        rows = np.stack([rng.permutation(TRAIN) for _ in range(CLIENTS)])[:, : steps * BATCH]
        params, stats = local(params, stats, rows.reshape(CLIENTS, steps, BATCH).swapaxes(0, 1))
        params, stats = share(setting, params, stats)
        yield {"kind": "round", "round": number + 1, "accuracies": np.asarray(accuracy(params, stats)).tolist()}


def mean_accuracy(setting: str) -> Measure:
    """Returns a measure: the mean test accuracy of the clients at the end in %."""
    return of(setting, "accuracies", lambda values: 100 * values[-1].mean())


CLAIMS = (
    Claim("BN at home is more accurate than averaged statistics", mean_accuracy(FED), ">", mean_accuracy(AVERAGED)),
    Claim("BN at home is more accurate than merged statistics", mean_accuracy(FED), ">", mean_accuracy(MERGED)),
    Claim("Statistics at home are more accurate than averaged ones", mean_accuracy(SILO), ">", mean_accuracy(AVERAGED)),
    Claim(
        "Merged statistics are more accurate than averaged ones", mean_accuracy(MERGED), ">", mean_accuracy(AVERAGED)
    ),
)
DISTANCE = (
    "digits corrupted in ten ways instead of digits of five data sets, a CNN of three layers, and clients that "
    "all take part in each round."
)


def table(lines: list[study.Line]) -> str:
    """Makes a table of the accuracy at the end: the mean over the clients, and that of the worst client."""
    text = ["| | test accuracy, %, mean of the clients | worst client |", "|---|---|---|"]
    for setting in SETTINGS:
        found = 100 * study.curves(lines, setting, "round", "accuracies")[1][:, -1]
        text.append(f"| {setting} | {study.spread(found.mean(1), 2)} | {study.spread(found.min(1), 2)} |")
    return "\n".join(text)


def draw(lines: list[study.Line], figure: Figure) -> None:
    """Draws the mean accuracy of the clients by round, and the accuracy of each client at the end."""
    by_round, by_client = figure.subplots(1, 2)
    for i, setting in enumerate(SETTINGS):
        rounds, found = study.curves(lines, setting, "round", "accuracies")
        study.band(by_round, rounds, 100 * found.mean(2), label=setting)
        last = 100 * found[:, -1]
        place = np.arange(CLIENTS) + 0.15 * (i - 1.5)
        by_client.errorbar(place, last.mean(0), study.deviation(last), ls="", marker="o", ms=4, label=setting)
    by_round.set(xlabel="round", ylabel="test accuracy, %, mean of the clients", xticks=range(0, rounds[-1] + 1, 5))
    by_client.set(ylabel="test accuracy, %, at the end", xticks=range(CLIENTS))
    by_client.set_xticklabels(CORRUPTIONS, rotation=35, ha="right")
    figure.legend(*by_round.get_legend_handles_labels(), loc="outside lower center", ncols=len(SETTINGS))


STUDY = study.Study("clients", SETTINGS, trial, table, draw, size=(11, 5), claims=CLAIMS, distance=DISTANCE)

if __name__ == "__main__":
    study.run(STUDY, __doc__, RESULTS)
