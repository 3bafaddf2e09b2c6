"""Tests that batches with NaN and Inf change nothing in a training, and that float16 trains with loss scaling."""

import re
from collections.abc import Iterator
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import jsonl
from experiments.data.images import embedded_digits
from experiments.data.pipeline import Batch, evaluation_batches, training_batches
from experiments.errors import RunError
from experiments.train import nonfinite
from experiments.train.config import Training
from experiments.train.devices import data_mesh
from experiments.train.loop import (
    Metrics,
    chunks,
    create_state,
    evaluate,
    make_eval_step,
    make_train_step,
)
from experiments.train.optimizer import adamw, warmup_cosine
from experiments.train.session import build_model
from tests.support.programs import finish, start, write_images

BATCH, EPOCHS = 64, 12
STEPS = EPOCHS * (4000 // BATCH)
EVERY = 20  # one batch of so many is bad: 5 %, in 12 epochs 37
BAD_STEPS = len(range(EVERY // 2, STEPS, EVERY))
BAD = {"NaN": np.nan, "Inf": np.inf, "-Inf": -np.inf}


def as_floats(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Converts the pixels to floats, so that they can hold NaN and Inf."""
    for batch in batches:
        yield {**batch, "image": batch["image"].astype(np.float32)}


def poisoned(batches: Iterator[Batch], every: int) -> Iterator[Batch]:
    """Puts NaN or Inf into one batch of every `every`: into whole images, single pixels or the whole batch, in turn."""
    rng = np.random.default_rng(0)
    for number, batch in enumerate(as_floats(batches)):
        if number % every == every // 2:
            image, value = batch["image"].copy(), list(BAD.values())[number // every % 3]
            part = [np.s_[:], np.s_[0], np.s_[-1, 14, 14]][rng.integers(3)]
            image[part] = value
            batch = {**batch, "image": image}
        yield batch


def state_and_step(partition: str, devices: int, precision: str = "float32", steps: int = STEPS):
    """Builds state and training step of `experiments.train` on this many devices."""
    training, mesh = Training(precision=precision), data_mesh(devices)
    model = build_model(training, partition)
    optimizer = nonfinite.skip_nonfinite(adamw(warmup_cosine(training.lr, steps, training.warmup), 0.05))
    scale = nonfinite.initial_scale if precision == "float16" else lambda: None
    step = make_train_step(model, optimizer, mesh, partition, lambda state, stats: {})
    return create_state(model, optimizer, 0, mesh, scale), step, make_eval_step(model, mesh), mesh


def trained(batches: Iterator[Batch], precision: str = "float32") -> tuple[float, list[Metrics]]:
    """Trains on these batches; returns the accuracy on the test images, and the metrics of the steps."""
    state, step, eval_step, mesh = state_and_step("jit", 1, precision)
    ((state, rows),) = chunks(step, state, batches, mesh, [STEPS])
    test = evaluation_batches(embedded_digits().test, 250)
    return evaluate(eval_step, state, test, mesh)["accuracy"], rows


def digits() -> Iterator[Batch]:
    return training_batches(embedded_digits().train, BATCH, EPOCHS, seed=0)


@pytest.fixture(scope="module")
def clean() -> float:
    """Returns the accuracy of a training without bad batches."""
    return trained(as_floats(digits()))[0]


@pytest.mark.slow
@pytest.mark.long
def test_bad_batches_cost_less_than_half_a_percent(clean: float) -> None:
    accuracy, rows = trained(poisoned(digits(), EVERY))
    assert sum(row["skipped"] for row in rows) == BAD_STEPS
    assert clean > 0.97
    assert abs(accuracy - clean) <= 0.005


@pytest.mark.slow
@pytest.mark.long
def test_float16_with_dynamic_loss_scaling_trains_as_float32(clean: float) -> None:
    accuracy, rows = trained(poisoned(digits(), EVERY), "float16")
    assert sum(row["skipped"] > 0 for row in rows) >= BAD_STEPS
    assert abs(accuracy - clean) <= 0.005


@pytest.mark.slow
@pytest.mark.parametrize(("partition", "devices"), [("shard_map", 8), ("jit", 1)])
def test_a_bad_batch_changes_nothing(partition: str, devices: int) -> None:
    state, step, _, mesh = state_and_step(partition, devices)
    good = next(as_floats(digits()))
    ((state, _),) = chunks(step, state, iter([good]), mesh, [1])
    for number, value in enumerate(BAD.values(), 1):
        bad = {**good, "image": good["image"].copy()}
        bad["image"][-1, 14, 14] = value
        before = jax.device_get(state)
        ((state, (row,)),) = chunks(step, state, iter([bad]), mesh, [1 + number])
        assert row["skipped"] == number
        for part in ("params", "batch_stats"):
            chex.assert_trees_all_equal(getattr(before, part), getattr(state, part))
        chex.assert_trees_all_equal(before.opt_state.inner_state, state.opt_state.inner_state)
    ((state, (row,)),) = chunks(step, state, iter([good]), mesh, [2 + number])
    assert row["skipped"] == 0 and state.opt_state.total_notfinite == len(BAD)
    assert np.isfinite(row["loss"])


@pytest.mark.slow
def test_an_overflow_of_the_scaled_loss_spares_the_statistics_and_halves_the_scale() -> None:
    state, step, _, mesh = state_and_step("jit", 1, "float16")
    state = state._replace(loss_scale=state.loss_scale.replace(scale=jnp.float32(2.0**40)))
    before = jax.device_get(state)
    batch = next(as_floats(digits()))
    ((state, (row,)),) = chunks(step, state, iter([batch]), mesh, [1])
    assert np.isfinite(row["loss"]) and row["skipped"] == 1  # the moments of this batch are good, its gradient is not
    chex.assert_trees_all_equal(before.batch_stats, state.batch_stats)
    assert state.loss_scale.scale == 2.0**39
    for number in range(2, 40):
        ((state, (row,)),) = chunks(step, state, iter([batch]), mesh, [number])
        if not row["skipped"]:
            break
    assert row["skipped"] == 0 and state.loss_scale.scale == 2.0 ** (40 - number + 1)
    assert all(
        (a != b).any() for a, b in zip(*map(jax.tree.leaves, (before.batch_stats, state.batch_stats)), strict=True)
    )


def test_an_optimizer_that_leaves_no_step_out_updates_the_statistics_as_ever() -> None:
    state = optax.sgd(0.1).init({"kernel": jnp.ones(2)})
    assert nonfinite.skipped(state) == {}
    assert nonfinite.unless_skipped(state, "new", "old") == "new"


def test_too_many_bad_steps_in_a_row_end_the_run() -> None:
    rows = [{"skipped": count} for count in (0, 1, 2, 3, 0)]
    nonfinite.check(rows, last=50, limit=3)
    with pytest.raises(RunError, match=r"no finite gradient in 3 steps in a row, up to step 49"):
        nonfinite.check(rows, last=50, limit=2)


@pytest.mark.slow
@pytest.mark.long
def test_the_program_in_float16_says_what_it_left_out(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", train=64, test=16)
    options = ["--data", "fashion-mnist", "--data-dir", images, "--batch-size", 16, "--width", 2, "--epochs", 2]
    text = finish(start(*options, "--precision", "float16", "--out", tmp_path / "out"))
    skipped = sum(line.get("skipped", 0) > 0 for line in jsonl.read(tmp_path / "out" / "metrics.jsonl"))
    assert (f"of which {skipped} without a finite gradient left out" in text) == (skipped > 0)
    text = finish(start(*options, "--lr", "1e38", "--skip-nonfinite", 2, "--out", tmp_path / "lost"), status=1)
    assert re.search(r"error: no finite gradient in 3 steps in a row, up to step \d", text)
