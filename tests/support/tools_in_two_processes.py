"""Runs one of two processes that recalibrate a network together: `python -m ... PORT PROCESS OUT`."""

import functools
import sys

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

from bnjax import tools
from tests.support import zoo
from tests.support.processes import join

ROWS = (8, 8, 4)  # of each batch; the last one is partial


def batches():
    """Returns the whole batches, equal in every process, each with a mean of its own."""
    return [np.asarray(zoo.images(seed, rows) + seed) for seed, rows in enumerate(ROWS)]


def halves(process):
    """Returns the half of each batch that one process reads."""
    return [np.split(batch, 2)[process] for batch in batches()]


def model():
    """Returns the network's apply function for the tools, and its variables."""
    net, variables = zoo.linen_net()
    return functools.partial(net.apply, mutable=["batch_stats"]), variables


def flat(prefix, batch_stats):
    """Returns statistics as NumPy arrays by name."""
    return {f"{prefix}/{'/'.join(path)}": np.asarray(leaf) for path, leaf in flatten_dict(batch_stats).items()}


def main(port, process, out):
    """Recalibrates on sharded batches in both ways, and merges what each process found in its own half."""
    join(port, process, devices=2)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    sharded = [jax.make_array_from_process_local_data(rows, half) for half in halves(process)]
    apply_fn, variables = model()
    results = {}
    for layerwise in (False, True):
        result = tools.recalibrate(apply_fn, variables, sharded, layerwise=layerwise, progress=False)
        results |= flat(f"layerwise={layerwise}", result["batch_stats"])
        # the result can be used at once, in this process alone and in all of them
        results[f"output/layerwise={layerwise}"] = np.asarray(
            multihost_utils.process_allgather(jax.jit(apply_fn)(result, sharded[0])[0], tiled=True)
        )
    own = tools.recalibrate(apply_fn, variables, halves(process), progress=False)["batch_stats"]
    gathered = multihost_utils.process_allgather(own)
    results |= flat("merged", tools.merge_stats(gathered, axis=0))
    np.savez(out, **results)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
