"""BN before or after the activation: the accuracy of both, and what the next layer is given.

Claim:    With BN after the ReLU a network is more accurate than with BN before it, each at its best learning rate.
Command:  python -m experiments.article.order                    # --smoke: seconds
Hardware: 2 CPU cores
Time:     29 min of one core

The article puts BN before the activation in its section 2.1 and after it in its program, 4.1. Ioffe & Szegedy 2015,
https://arxiv.org/abs/1502.03167, put it immediately before the nonlinearity. On ImageNet, one run each,
https://github.com/ducha-aiki/caffenet-benchmark/blob/master/batchnorm.md has 47.8 % before and 49.3 % after with
CaffeNet, but 60.7 % before and 59.6 % after with GoogLeNet (whose two runs also differ in their initial weights).
Here four times Conv 3×3 with stride 2 and BN before or after the ReLU, in three widths, at four learning rates:
Fashion-MNIST, 25,600 images once, SGD with momentum. And the article's own program both ways on 4,000 digits.

Rule: at each order's best rate (by the mean over the seeds), the difference of a seed's two accuracies. An order is
ahead where the 95 % interval of Student's t does not contain zero. The claim holds if "after" is ahead everywhere,
holds in part if somewhere, and is undecided if neither is ahead anywhere.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
from flax import linen as nn
from matplotlib.figure import Figure

from bnjax.linen import BatchNorm
from experiments.article.keras_port import KerasNet, keras_adam
from experiments.data.images import Labelled, embedded_digits
from experiments.repro import study

ORDERS = ("before", "after")
MEASURES = ("mean", "var", "zeros", "constant", "mean's share", "largest eigenvalue")
WIDTHS = {"narrow": (4, 8, 16, 32), "middle": (8, 16, 32, 64), "wide": (16, 32, 64, 128)}
RATES = (0.0125, 0.05, 0.2, 0.8)
ARTICLE = "the article's"
SETTINGS = {f"{n}, {rate}, {order}": (n, rate, order) for n in WIDTHS for rate in RATES for order in ORDERS}
SETTINGS |= {f"{ARTICLE}, {order}": (ARTICLE, 1e-3, order) for order in ORDERS}


class Net(nn.Module):
    """Blocks of Conv 3×3 with stride 2, BN and ReLU in either order; a Dense layer gives the logits."""

    order: str
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """images: `[N, H, W, 1]` float. Returns the logits, `[N, 10]`."""
        x = images
        for width in self.widths:
            norm = BatchNorm(use_running_average=not train, momentum=0.9)
            x = nn.Conv(width, (3, 3), strides=2)(x)  # the bias matters to what follows only in the order "after"
            x = nn.relu(norm(x)) if self.order == "before" else norm(nn.relu(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


def sgd(rate: float, steps: int) -> optax.GradientTransformation:
    """Returns SGD with momentum 0.9 and a cosine from `rate` to 0. The rate is an array: all share one program."""

    def of(rate: Any) -> optax.GradientTransformation:
        return optax.chain(optax.sgd(optax.cosine_decay_schedule(1.0, steps), momentum=0.9), optax.scale(rate))

    return optax.inject_hyperparams(of)(rate=rate)


def trial(setting: str, seed: int, config: study.Config) -> Iterator[study.Line]:
    """Yields the test accuracy on the way, and what the layers behind a BN are given before and after the training."""
    network, rate, order = SETTINGS[setting]
    if network == ARTICLE:
        model, optimizer, data = KerasNet(bn_first=order == "before"), keras_adam(rate), embedded_digits()
        options = dict(steps=config.pick(625, 2), every=config.pick(625, 2), batch_size=32)
    else:
        steps = config.pick(200, 2)
        model, optimizer = Net(order, config.pick(WIDTHS[network], (2, 4))), sgd(rate, steps)
        data, options = study.pictures(config), dict(steps=steps, every=steps, batch_size=128)
    variables = model.init(jax.random.key(seed), jnp.zeros((1, 28, 28, 1)), train=False)
    yield from given(model, variables, data.test, "start")
    for state, line in study.train(model, optimizer, data, seed=seed, **options):
        yield line
        variables = {"params": state.params, "batch_stats": state.batch_stats}
    yield from given(model, variables, data.test, "end")


def given(model: nn.Module, variables: Any, data: Labelled, when: str) -> Iterator[study.Line]:
    """Yields the distribution of the input of each layer behind a BN, over 1,000 images in training mode.

    `mean` and `var`: over the rows, averaged over the channels; `zeros`: the share of exact zeros; `constant`: the
    share of channels that are the same for every row; `mean's share`: of the mean in the mean square, averaged over
    the channels; `largest eigenvalue`: its share of the trace of the channels' second moments (1/C: all directions
    alike). A layer whose input is not finite, because the training diverged, has no line.
    """
    inputs = []

    def keep(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, nn.Conv | nn.Dense):
            inputs.append((np.asarray(args[0], np.float64), context.module.features))
        return call(*args, **kwargs)

    images = data.images[:1_000] / np.float32(255)
    with nn.intercept_methods(keep):
        model.apply(variables, images, train=True, mutable=["batch_stats"])
    for number, ((_, channels), (x, _)) in enumerate(pairwise(inputs), start=2):
        rows = x.reshape(-1, channels)
        if not np.isfinite(rows).all():
            continue
        mean, var = rows.mean(0), rows.var(0)
        eigenvalues = np.linalg.eigvalsh(rows.T @ rows)
        yield {
            "kind": "input",
            "when": when,
            "layer": number,
            "mean": mean.mean(),
            "var": var.mean(),
            "zeros": (rows == 0).mean(),
            "constant": (var < 1e-6).mean(),
            "mean's share": (mean**2 / np.maximum(mean**2 + var, 1e-30)).mean(),
            "largest eigenvalue": eigenvalues[-1] / eigenvalues.sum(),
        }


def accuracies(lines: list[study.Line], network: str, order: str) -> dict[float, np.ndarray]:
    """Returns the accuracy at the end in %, `[seeds]`, by rate."""
    named = {rate: s for s, (n, rate, o) in SETTINGS.items() if (n, o) == (network, order)}
    return {rate: 100 * study.curves(lines, setting, "step", "accuracy")[1][:, -1] for rate, setting in named.items()}


def best(lines: list[study.Line], network: str, order: str) -> tuple[float, np.ndarray]:
    """Returns the rate with the highest mean accuracy, and the accuracies there, `[seeds]`."""
    found = accuracies(lines, network, order)
    return max(found.items(), key=lambda item: item[1].mean())


def compared(after: np.ndarray, before: np.ndarray) -> tuple[str, str]:
    """Returns which of two orders is ahead in paired seeds by the rule (or "neither"), and the differences in words."""
    difference = after - before
    if len(difference) < 2:
        return "neither", f"{difference[0]:+.2f}, one seed"
    low, high = scipy.stats.ttest_1samp(difference, 0).confidence_interval(0.95)
    text = f"{difference.mean():+.2f} ({low:+.2f} to {high:+.2f})"
    return "after" if low > 0 else "before" if high < 0 else "neither", text


def ahead(lines: list[study.Line], network: str) -> tuple[str, str]:
    """Returns which order is ahead where each has its best rate, and the differences in words."""
    return compared(best(lines, network, "after")[1], best(lines, network, "before")[1])


def verdict(lines: list[study.Line]) -> str:
    """Returns whether the claim holds, and which order is ahead in which network."""
    found = {network: ahead(lines, network)[0] for network in (*WIDTHS, ARTICLE)}
    ahead_in = Counter(found.values())
    part = "does not hold" if ahead_in["before"] else "undecided"
    whole = "holds" if set(found.values()) == {"after"} else "in part" if ahead_in["after"] else part
    seeds = len({line["seed"] for line in lines})
    return f"**{whole}**, {seeds} seeds. Ahead is " + ", ".join(f"{order} ({name})" for name, order in found.items())


def table(lines: list[study.Line]) -> str:
    """Returns the verdict, the accuracy of both orders at their best rates, all rates, and the next layer's input."""
    text = [f"{verdict(lines)}.", ""]
    text += [
        "| network | before, % | at rate | after, % | at rate | after − before (95 % interval) |",
        "|---" * 6 + "|",
    ]
    for network in (*WIDTHS, ARTICLE):
        cells = [c for order in ORDERS for rate, a in [best(lines, network, order)] for c in (study.spread(a, 2), rate)]
        text.append(f"| {network} | {' | '.join(map(str, cells))} | {ahead(lines, network)[1]} |")
    text += [
        "",
        f"| test accuracy, % | {' | '.join(f'rate {rate:g}' for rate in RATES)} |",
        "|---" * (len(RATES) + 1) + "|",
    ]
    for network in WIDTHS:
        before, after = (accuracies(lines, network, order).values() for order in ORDERS)
        rows = {
            order: [study.spread(a, 2) for a in found] for order, found in zip(ORDERS, (before, after), strict=True)
        }
        rows["after − before"] = [compared(a, b)[1] for a, b in zip(after, before, strict=True)]
        text += [f"| {network}, {name} | {' | '.join(row)} |" for name, row in rows.items()]
    heading = ["what the next layer is given, at the end", "layer", *MEASURES]
    text += ["", f"| {' | '.join(heading)} |", "|---" * len(heading) + "|"]
    for network in (*WIDTHS, ARTICLE):
        for order in ORDERS:
            for layer, row in next_inputs(lines, network, order, "end").items():
                values = " | ".join(study.spread(row[name], 2) for name in MEASURES)
                text.append(f"| {network}, {order} | {layer} | {values} |")
    return "\n".join(text)


def next_inputs(lines: list[study.Line], network: str, order: str, when: str) -> dict[int, dict[str, list[float]]]:
    """Returns by layer each measure of its input at the order's best rate, `[seeds]`."""
    setting = next(s for s, key in SETTINGS.items() if key == (network, best(lines, network, order)[0], order))
    here = [x for x in lines if x["setting"] == setting and x["kind"] == "input" and x["when"] == when]
    layers = sorted({line["layer"] for line in here})
    return {n: {name: [x[name] for x in here if x["layer"] == n] for name in MEASURES} for n in layers}


def draw(lines: list[study.Line], figure: Figure) -> None:
    """Draws accuracy by rate, the paired differences, and two measures of the next layer's input by layer."""
    by_rate, pairs, zeros, eigenvalue = figure.subplots(1, 4)
    for color, order in enumerate(ORDERS):
        for network, marker in zip(WIDTHS, "v^o", strict=True):
            found = accuracies(lines, network, order)
            style = dict(color=f"C{color}", marker=marker, capsize=3, label=f"{network}, {order}")
            by_rate.errorbar(
                list(found), [a.mean() for a in found.values()], [study.deviation(a) for a in found.values()], **style
            )
    by_rate.set(
        xscale="log", xlabel="learning rate", ylabel="test accuracy, %", title="Fashion-MNIST, mean and deviation"
    )
    by_rate.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
    by_rate.minorticks_off()
    by_rate.legend(fontsize="small")
    networks = (*WIDTHS, ARTICLE)
    for place, network in enumerate(networks):
        difference = best(lines, network, "after")[1] - best(lines, network, "before")[1]
        pairs.plot([place] * len(difference), difference, "ok", alpha=0.5)
        pairs.plot([place - 0.2, place + 0.2], [difference.mean()] * 2, "k")
    pairs.axhline(0, color="gray", lw=1)
    pairs.set_xticks(range(len(networks)), networks)
    pairs.set(title="at each order's best rate, by seed", ylabel="accuracy after − before, %")
    for axes, measure in ((zeros, "zeros"), (eigenvalue, "largest eigenvalue")):
        for color, order in enumerate(ORDERS):
            for when, style in (("start", ":"), ("end", "-")):
                found = next_inputs(lines, "middle", order, when)
                values = np.array([row[measure] for row in found.values()]).T
                study.band(axes, np.array(list(found)), values, label=f"{order}, {when}", color=f"C{color}", ls=style)
        axes.set(title=f"input of the next layer: {measure}", xlabel="layer (middle width)", ylim=(0, 1))
        axes.set_xticks(list(found))
        axes.legend(fontsize="small")


STUDY = study.Study("order", tuple(SETTINGS), trial, table, draw, size=(17, 4))

if __name__ == "__main__":
    study.run(STUDY, __doc__, Path(__file__).parent / "results")
