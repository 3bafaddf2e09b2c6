"""Times a layer and its all-reduce over several devices; `experiments.bench.clock.scaling` starts it in each process.

Command:  python -m experiments.bench.clock.scaling.processes '{"cases": [[1024, 64]], "meshes": [1, 8], "rounds": 10}'
          and, in each of several processes, '{..., "address": "127.0.0.1:1234", "processes": 2, "index": 0}'

A single process simulates many devices; several processes have one each, connected by gloo. The first process prints a
JSON line for each time. All of them must run the same collectives in the same order, so the rounds are counted, not
timed.
"""

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import tyro
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax
from experiments import jsonl
from experiments.bench.clock.timing import Run, interleaved

CHAIN = 16  # all-reduces in one program, so that the time to start it does not count
CURVES = ("local", "pooled", "all-reduce")


def layer(pooled: bool) -> Callable[..., Any]:
    """Returns a step that computes (y, dx) of a device's rows, with statistics over all rows if `pooled`, else over its
    own.
    """

    def step(x: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, pullback = jax.vjp(lambda x: bnjax.batch_norm(x, axis_name="data" if pooled else None)[0], x)
        return y, *pullback(dy)

    return step


def all_reduces(v: jax.Array) -> jax.Array:
    """Computes `CHAIN` means over the devices, one after the other."""
    return jax.lax.fori_loop(0, CHAIN, lambda _, v: jax.lax.pmean(v, "data"), v)


def program(curve: str, mesh: Mesh) -> Any:
    """Compiles a curve's step for arrays split over the mesh; the layer's results reuse the buffers of the previous
    call.
    """
    over = dict(mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    if curve == "all-reduce":
        # check_vma would type the means as replicated, unlike the varying array that the loop starts with.
        return jax.jit(jax.shard_map(all_reduces, **over, check_vma=False))
    step = jax.shard_map(layer(curve == "pooled"), **over)
    return jax.jit(lambda x, dy, *_: step(x, dy), donate_argnums=(2, 3), keep_unused=True)


def run_of(curve: str, mesh: Mesh, rows: int, channels: int) -> Run:
    """Returns a function that runs a layer on this many rows in total, or the all-reduces of its statistics."""
    compiled, rng = program(curve, mesh), np.random.default_rng(jax.process_index())

    def place(make: Callable[..., np.ndarray], rows: int, width: int) -> jax.Array:
        """Creates an array that is split over the devices, from this process's rows."""
        mine = make((rows // jax.process_count(), width), np.float32)
        return jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), mine)

    if curve == "all-reduce":
        v = place(rng.standard_normal, mesh.size, 2 * channels)
        return lambda: jax.block_until_ready(compiled(v))
    x, dy = (place(rng.standard_normal, rows, channels) for _ in range(2))
    held = [place(np.zeros, rows, channels) for _ in range(2)]

    def run() -> None:
        held[:] = jax.block_until_ready(compiled(x, dy, *held))

    return run


def measure(cases: list[tuple[int, int]], meshes: list[int], rounds: int) -> Iterator[dict[str, Any]]:
    """Yields a row for each case, number of devices and curve."""
    for rows, channels in cases:
        runs = {
            (curve, count): run_of(curve, Mesh(np.array(jax.devices()[:count]), ("data",)), rows, channels)
            for curve in CURVES
            for count in meshes
        }
        times = interleaved(runs, rounds=rounds, seconds=math.inf)
        for (curve, count), seconds in times.items():
            each = seconds.median / (CHAIN if curve == "all-reduce" else 1)
            size = dict(rows=rows, channels=channels, devices=count, bytes=rows * channels * 4)
            yield {"curve": curve, **size, "milliseconds": round(each * 1e3, 5), "spread": round(seconds.spread, 3)}


def join(address: str, processes: int, index: int) -> None:
    """Connects to the other processes on this machine."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    options = dict(initialization_timeout=60, coordinator_bind_address=address)
    jax.distributed.initialize(address, processes, index, **options)


def main(work: tyro.conf.Positional[str]) -> None:
    """Prints a JSON line for each time.

    Args:
        work: JSON with cases, meshes and rounds; with several processes also address, processes and index.
    """
    todo = json.loads(work)
    several = todo.get("processes", 1) > 1
    jax.config.update("jax_num_cpu_devices", 1 if several else max(todo["meshes"]))
    if several:
        join(todo["address"], todo["processes"], todo["index"])
    for row in measure(todo["cases"], todo["meshes"], todo["rounds"]):
        if jax.process_index() == 0:
            print(jsonl.text(row), end="", flush=True)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
