"""Tests the character corpus and the text networks: how padding and later positions can affect a prediction."""

import jax
import numpy as np
import pytest

from experiments.data import text
from experiments.data.pipeline import Batch
from experiments.repro.shen2020 import SETTINGS

LONGEST = 24
LINES = ["x = 1", "def long_enough_to_be_cut(everywhere):", "y"]


@pytest.fixture(scope="module")
def corpus() -> text.Text:
    return text.corpus(LONGEST)


def decoded(tokens: np.ndarray) -> str:
    return "".join(text.CHARACTERS[token - 1] for token in tokens if token != text.PADDING)


def test_the_modules_are_split_by_name() -> None:
    held_back = {path.stem for path in text.modules() if text.is_held_back(path)}
    trained_on = {path.stem for path in text.modules()} - held_back
    assert {"argparse", "random", "typing"} <= held_back | trained_on
    assert 0.04 < len(held_back) / len(text.modules()) < 0.2


def test_each_part_holds_the_lines_of_its_own_modules(corpus: text.Text) -> None:
    for part, held_back in ((corpus.train, False), (corpus.test, True)):
        expected = [
            line for path in text.modules() if text.is_held_back(path) == held_back for line in text.lines(path)
        ]
        assert len(part) == len(expected)
        for i in range(0, len(part), len(part) // 50):
            assert decoded(part[i]) == f"\n{expected[i]}\n"[: LONGEST + 1]


def test_it_is_a_corpus_of_every_printable_character(corpus: text.Text) -> None:
    assert sorted(np.unique(corpus.train)) == list(range(text.VOCABULARY))
    assert len(corpus.train) > 20 * LONGEST and corpus.train.dtype == np.uint8


def test_labels_are_the_next_characters_and_padding_has_no_weight() -> None:
    batch = text.batch(text.encode(LINES, LONGEST))
    for line, token, label, weight in zip(LINES, batch["token"], batch["label"], batch["weight"], strict=True):
        given, following = f"\n{line}"[:LONGEST], f"{line}\n"[:LONGEST]
        assert decoded(label) == following and decoded(token[: len(given)]) == given
        assert weight.tolist() == [1] * len(following) + [0] * (LONGEST - len(following))


def test_more_width_is_more_padding_and_nothing_else() -> None:
    tokens = text.encode(LINES, LONGEST)
    narrow, wide = text.batch(tokens), text.batch(tokens, 3 * LONGEST)
    for name in narrow:
        np.testing.assert_array_equal(wide[name][:, :LONGEST], narrow[name])
    assert not any(wide[name][:, LONGEST:].any() for name in ("label", "weight"))


def test_training_batches_depend_on_the_seed_alone(corpus: text.Text) -> None:
    few = corpus.train[:100]

    def batches(seed: int) -> np.ndarray:
        source = text.training_batches(few, 30, seed=seed)
        return np.stack([next(source)["token"] for _ in range(4)])

    np.testing.assert_array_equal(batches(1), batches(1))
    assert (batches(1) != batches(2)).any()
    whole = {row.tobytes() for row in text.batch(few)["token"]}
    assert {row.tobytes() for row in batches(1).reshape(-1, LONGEST)} <= whole


def test_the_fourth_batch_begins_another_order() -> None:
    tokens = text.encode([f"{i}" for i in range(10)], LONGEST)
    source = text.training_batches(tokens, 3, seed=0)
    first, second = (np.concatenate([next(source)["token"][:, 1] for _ in range(3)]) for _ in range(2))
    assert len(set(first)) == len(set(second)) == 9
    assert list(first) != list(second)


def test_evaluation_batches_hold_every_line_once() -> None:
    batches = list(text.evaluation_batches(text.encode(LINES, LONGEST), 2))
    assert [decoded(row) for batch in batches for row in batch["label"]][:3] == [f"{x}\n"[:LONGEST] for x in LINES]
    assert batches[1]["weight"][1].sum() == 0 and batches[1]["token"].shape == (2, LONGEST)


def test_a_corpus_says_which_one_it_is(corpus: text.Text) -> None:
    here = corpus.describe()
    assert here == text.corpus(LONGEST).describe()
    assert here["lines"] == [len(corpus.train), len(corpus.test)]
    assert here["characters"] == [int(text.batch(part)["weight"].sum(dtype=np.float64)) for part in corpus]
    assert text.Text(corpus.train[1:], corpus.test).describe()["fingerprint"] != here["fingerprint"]


def difference(setting: str, one: Batch, other: Batch, count: int, *, train: bool) -> float:
    """Returns the largest difference of a network's logits for two batches, at the first `count` labelled positions."""
    build, norm, masked = SETTINGS[setting]
    model = build(norm, text.VOCABULARY, masked, width=8, layers=1)
    variables = model.init(jax.random.key(0), *text.inputs(one), train=False)

    def logits(batch: Batch) -> np.ndarray:
        y, _ = model.apply(variables, *text.inputs(batch), train=train, mutable=["batch_stats"])
        return np.asarray(y)[batch["weight"] > 0][:count]

    return float(np.abs(logits(one) - logits(other)).max())


ROUNDING = 300 * np.finfo(np.float32).eps  # logits of order 1, of sums of a few hundred terms


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("train", [True, False])
def test_padding_reaches_a_prediction_through_unmasked_statistics_alone(setting: str, train: bool) -> None:
    narrow, wide = (text.batch(text.encode(LINES, LONGEST), width) for width in (LONGEST, 2 * LONGEST))
    found = difference(setting, narrow, wide, 3 * LONGEST, train=train)
    assert found > 0.1 if train and "without the mask" in setting else found < ROUNDING


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("train", [True, False])
def test_the_future_reaches_a_prediction_through_the_statistics_of_its_batch_alone(setting: str, train: bool) -> None:
    """Checks that later positions matter only for BN in training mode: PowerNorm uses statistics of earlier batches."""
    tokens = text.encode(LINES[1:2], LONGEST)
    other = np.where(np.arange(LONGEST + 1) < LONGEST // 2, tokens, 5)
    found = difference(setting, text.batch(tokens), text.batch(other), LONGEST // 2, train=train)
    assert found > 0.01 if train and "BN" in setting else found < ROUNDING
