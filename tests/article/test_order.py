"""BN before and after the activation: what the networks compute, what the next layer is given, and the rule."""

import jax
import numpy as np
import optax
import pytest

from experiments.article import order
from experiments.article.keras_port import KerasNet
from experiments.data.images import embedded_digits

IMAGES = embedded_digits().test.images[::10] / np.float32(255)
NETWORKS = {
    "before": [order.Net("before", (4, 8)), KerasNet(bn_first=True)],
    "after": [order.Net("after", (4, 8)), KerasNet()],
}


def start(model):
    return model.init(jax.random.key(0), IMAGES[:1], train=False)


@pytest.mark.parametrize("which", [0, 1], ids=["blocks", "the article's"])
def test_both_orders_have_the_same_parameters(which):
    shapes = [jax.tree.map(np.shape, start(NETWORKS[name][which])) for name in order.ORDERS]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", order.ORDERS)
def test_what_the_next_layer_is_given(name):
    """After the ReLU BN makes mean 0 and variance 1; before it, the ReLU leaves zeros and a positive mean."""
    model = order.Net(name, (4, 8))
    lines = list(order.given(model, start(model), embedded_digits().test, "start"))
    assert [line["layer"] for line in lines] == [2, 3]
    for line in lines:
        assert 0 < line["largest eigenvalue"] <= 1 and line["constant"] == 0
        if name == "after":
            assert abs(line["mean"]) < 1e-4 and abs(line["var"] - 1) < 1e-2
            assert line["zeros"] == 0 and line["mean's share"] < 1e-4
        else:
            assert line["mean"] > 0.1 and line["var"] < 0.8
            assert 0.2 < line["zeros"] < 0.8 and line["mean's share"] > 0.05


def test_the_rate_is_that_of_a_plain_optimizer():
    """The step in which all rates share one program is that of SGD with this rate."""
    params, grads = {"w": np.float32([1, 2])}, {"w": np.float32([0.5, -1])}
    plain = optax.sgd(optax.cosine_decay_schedule(0.2, 3), momentum=0.9)
    shared = order.sgd(0.2, 3)
    states = [plain.init(params), shared.init(params)]
    for _ in range(3):
        updates, states[0] = plain.update(grads, states[0], params)
        other, states[1] = shared.update(grads, states[1], params)
        np.testing.assert_allclose(other["w"], updates["w"], rtol=1e-6)


def made_up(before, after):
    """Lines in which every network has these accuracies, by seed, at its best rate."""
    accuracy = {"before": before, "after": after}
    return [
        {"setting": setting, "seed": seed, "step": 1, "accuracy": value / 100 - (rate == order.RATES[0]) / 10}
        for setting, (_, rate, name) in order.SETTINGS.items()
        for seed, value in enumerate(accuracy[name])
    ]


@pytest.mark.parametrize(
    ("before", "after", "ahead", "verdict"),
    [
        ([80, 81, 82], [82, 83.1, 83.9], "after", "holds"),
        ([82, 83.1, 83.9], [80, 81, 82], "before", "does not hold"),
        ([80, 81, 82], [80.5, 80.5, 82.2], "neither", "undecided"),
    ],
)
def test_the_rule(before, after, ahead, verdict):
    lines = made_up(before, after)
    assert order.best(lines, "wide", "after")[0] != order.RATES[0]
    assert order.ahead(lines, "wide")[0] == ahead
    assert order.verdict(lines).startswith(f"**{verdict}**, 3 seeds. Ahead is {ahead} (narrow)")
