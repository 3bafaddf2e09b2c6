"""Runs `python -m experiments.train` as a separate process, reads what it wrote, and compares runs bit by bit."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments import jsonl
from experiments.data.images import IMAGES, LABELS
from tests.support.processes import free_port

ROOT = Path(__file__).parents[2]
LIMIT = 300  # seconds, many times what a smoke run takes


def start(
    *options: object,
    module: str = "experiments.train",
    under: tuple[str, ...] = (),
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[str]:
    """Starts the program with these options; `under` is a command that runs it."""
    command = [*under, sys.executable, "-W", "error", "-m", module, *map(str, options)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **(environment or {})}
    return subprocess.Popen(command, cwd=ROOT, text=True, env=environment, **pipes)


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    """Waits for the program; returns its standard output, or its standard error if `status` is a failure."""
    try:
        out, errors = process.communicate(timeout=LIMIT)
    finally:
        process.kill()  # where it hangs
    assert process.returncode == status, errors
    return errors if status else out


def free_address() -> str:
    """Returns localhost:port, where no process listens."""
    return f"localhost:{free_port()}"


def idx(magic: int, values: np.ndarray) -> bytes:
    """Returns the content of an IDX file."""
    return np.array([magic, *values.shape], ">u4").tobytes() + values.astype(np.uint8).tobytes()


def write_images(folder: Path, train: int, test: int) -> Path:
    """Writes an MNIST-format folder of noise, for runs whose accuracy does not matter."""
    folder.mkdir()
    for part, count in (("train", train), ("t10k", test)):
        images = np.random.default_rng(count).integers(0, 256, (count, 28, 28), np.uint8)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(IMAGES, images))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(LABELS, np.arange(count) % 10))
    return folder


def compilation_cache(folder: Path) -> dict[str, str]:
    """Returns the environment in which a program reuses what earlier ones compiled."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def learning(out: Path) -> list[jsonl.Line]:
    """Returns the lines of metrics that do not depend on the clock or the machine."""
    return [line for line in jsonl.read(out / "metrics.jsonl") if line["kind"] in ("train", "eval")]


def committed(out: Path) -> list[int]:
    """Returns the steps of the complete checkpoints."""
    folder = out / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []


def checkpoint(out: Path, step: int) -> dict[str, np.ndarray]:
    """Returns every saved array by its path, whatever its sharding was."""
    folder, reader = (out / "checkpoints" / str(step) / "state").absolute(), ocp.PyTreeCheckpointer()
    saved = reader.metadata(folder).item_metadata.tree
    restored = reader.restore(
        folder, restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
    )
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(restored)}


def assert_same_run(one: Path, other: Path) -> None:
    """Asserts equal metrics in every step, and equal bits in the last checkpoint."""
    assert learning(one) == learning(other)
    step = committed(one)[-1]
    assert committed(other)[-1] == step
    first, second = checkpoint(one, step), checkpoint(other, step)
    assert first.keys() == second.keys()
    for part in ("params", "batch_stats", "opt_state"):
        assert any(part in name for name in first)
    for name, leaf in first.items():
        np.testing.assert_array_equal(leaf, second[name], err_msg=name)
    places = [out / "checkpoints" / str(step) / "batches" / "metadata" for out in (one, other)]
    assert places[0].read_text() == places[1].read_text()
