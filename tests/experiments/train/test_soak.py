"""Tests 20,000 steps on four devices: memory does not grow, nothing is compiled again, and replicas stay equal."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from bnjax.linen import BatchNorm
from experiments.data.images import Labelled
from experiments.data.pipeline import evaluation_batches, training_batches
from experiments.models.convolutional import ConvNet
from experiments.train.devices import data_mesh
from experiments.train.fingerprint import fingerprint
from experiments.train.loop import axis_name, chunks, create_state, evaluate, make_eval_step, make_train_step
from experiments.train.nonfinite import skip_nonfinite
from experiments.train.optimizer import adamw, warmup_cosine

STEPS, WARM, CHUNK, BATCH, DEVICES = 20_000, 5_000, 1_000, 16, 4
GROWTH = 4 * 2**20  # bytes: what 15,000 steps would keep at 280 bytes each, the size of one small array and its owner


def resident() -> int:
    """Returns the resident memory of this process in bytes."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Returns a list that grows by the name of each program that XLA compiles."""
    found: list[str] = []

    def note(event: str, _: float, **details: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(str(details.get("fun_name", event)))

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


@pytest.mark.slow
@pytest.mark.long
def test_twenty_thousand_steps_leave_no_trace() -> None:
    rng = np.random.default_rng(0)
    data = Labelled(rng.integers(0, 256, (64, 28, 28, 1), np.uint8), np.arange(64, dtype=np.int32) % 10)
    mesh = data_mesh(DEVICES)
    model = ConvNet(partial(BatchNorm, momentum=0.9, axis_name=axis_name("shard_map")), widths=(2, 2))
    optimizer = skip_nonfinite(adamw(warmup_cosine(1e-3, STEPS, 0.1), 0.05))
    step = make_train_step(model, optimizer, mesh, "shard_map", lambda state, stats: {})
    eval_step = make_eval_step(model, mesh)
    batches = training_batches(data, BATCH, epochs=STEPS * BATCH // 64, seed=0, max_shift=0)
    memory = {}
    with compilations() as compiled:
        state = create_state(model, optimizer, 0, mesh)
        compiled.clear()
        for state, rows in chunks(step, state, batches, mesh, range(CHUNK, STEPS + 1, CHUNK)):  # noqa: B020
            evaluate(eval_step, state, evaluation_batches(data, BATCH), mesh)
            memory[int(state.step)] = resident()
            fingerprint(state)  # raises if the bits on a device differ from the first's
            skipped, loss = rows[-1]["skipped"], rows[-1]["loss"]
        assert len(compiled) == 2, compiled  # the one shape of the training step, the one of the evaluation
        evaluate(eval_step, state, evaluation_batches(data, 2 * BATCH), mesh)
        assert len(compiled) == 3, compiled
    assert int(state.step) == STEPS and not skipped
    assert loss < 0.1, "a network that learns nothing proves nothing"
    assert memory[STEPS] - memory[WARM] < GROWTH, memory
