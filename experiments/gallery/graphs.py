"""Molecules of several sizes in padded graph batches: BN with and without a mask, LayerNorm and none.

Claim:    With a mask BN gives the same outputs however graphs are padded and batched; without, statistics taken with
          other padding err. Masked BN errs less than BN without the mask, LayerNorm and no normalization.
Command:  python -m experiments.gallery.graphs                  # --smoke: seconds
Hardware: 1 CPU core
Time:     4 min of one core

The boiling points of 4,633 molecules of 2 to 32 atoms (`experiments.data.molecules`), of which 926 are for testing; the
network passes messages along the bonds, and takes the sum and the mean over the atoms of a molecule. Batches of 32
molecules are padded as jraph does it (`jraph.pad_with_graphs`): the padding is one more graph, whose edges all go from
its first node to itself. Messages add up there, and BN without the mask counts them. The learning rate, and the sum
beside the mean, were chosen with seed 100, not one of the five.
"""

from functools import partial

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from flax import linen as nn

from experiments.data import molecules
from experiments.gallery import RESULTS, padding
from experiments.gallery.padding import Batch, Padding, Records, Task
from experiments.models.convolutional import Norm, Unnormalised
from experiments.repro import study

NORMS = {**padding.NORMS, "no norm": (Unnormalised, False)}
SETTINGS, WIDTH, LAYERS = tuple(NORMS), 48, 3
PADDINGS = (
    Padding("to 512 nodes", 512),
    Padding("to 1,024 nodes", 1_024),
    Padding("by size, to multiples of 256", 256, True),
)
EDGES = 5 / 2  # edges of a padded batch for each of its nodes; no molecule has more
MIDDLE, SCALE = 460, 90  # K: about the mean and the standard deviation of the boiling points


class GraphNet(nn.Module):
    """Layers of message passing with a norm on the nodes, beside shortcuts; then sum and mean over the nodes, and two
    Dense.
    """

    norm: Norm
    masked: bool  # whether the norms get the mask
    width: int = WIDTH
    layers: int = LAYERS

    @nn.compact
    def __call__(self, graphs: jraph.GraphsTuple, *, train: bool) -> jax.Array:
        """Computes a number for each graph, `[graphs]`."""
        mask = {"mask": jraph.get_node_padding_mask(graphs)[:, None]} if self.masked else {}
        dense, count = partial(nn.Dense, self.width), len(graphs.nodes)
        x = dense()(graphs.nodes)
        for _ in range(self.layers):
            messages = nn.relu(dense()(x)[graphs.senders] + dense()(graphs.edges))
            received = jraph.segment_sum(messages, graphs.receivers, count)
            y = dense(use_bias=False)(jnp.concatenate([x, received], -1))
            x += nn.relu(self.norm(use_running_average=not train)(y, **mask))
        graph_of = jnp.repeat(jnp.arange(len(graphs.n_node)), graphs.n_node, total_repeat_length=count)
        pooled = jraph.segment_sum(x, graph_of, len(graphs.n_node))
        mean = pooled / jnp.maximum(graphs.n_node, 1)[:, None]
        pooled = jnp.concatenate([pooled, mean], -1)
        return nn.Dense(1)(nn.relu(dense()(pooled)))[:, 0]


def records(data: molecules.Molecules) -> Records:
    """Gives access to molecules in padded batches; the graph of the padding is one more row."""
    sizes = np.array([graph.n_node[0] for graph in data.graphs])
    targets = (data.boiling_points - MIDDLE) / SCALE

    def batch(rows: np.ndarray, multiple: int) -> Batch:
        real, none = rows[rows >= 0], [(0, 1 + int((rows < 0).sum()))]
        nodes = -(-(int(sizes[real].sum()) + 1) // multiple) * multiple
        graphs = jraph.batch_np([data.graphs[row] for row in real])
        graphs = jraph.pad_with_graphs(graphs, nodes, int(EDGES * nodes), len(rows) + 1)
        return Batch((graphs,), np.pad(real, none, constant_values=-1), np.pad(targets[real], none))

    return Records(sizes, batch)


def load(config: study.Config) -> tuple[Records, Records, Records]:
    """Loads the molecules for training, every fourth of them for statistics, and those for testing."""
    train, test = molecules.load(config.pick(None, 200))
    few = molecules.Molecules(train.graphs[::4], train.boiling_points[::4])
    return records(train), records(few), records(test)


def build(setting: str, config: study.Config) -> GraphNet:
    """Builds the network of a setting."""
    return GraphNet(*NORMS[setting], width=config.pick(WIDTH, 4), layers=config.pick(LAYERS, 1))


def loss(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Computes the squared error of each graph."""
    return (outputs - targets) ** 2


def error(outputs: np.ndarray, targets: np.ndarray) -> float:
    """Computes the root of the mean squared error in K."""
    return SCALE * float(np.sqrt(np.mean((outputs - targets) ** 2)))


TASK = Task(build, load, loss, error, PADDINGS, size=32, steps=400, rate=1e-2)
CLAIMS = padding.claims(TASK, SETTINGS, padding.rounding(LAYERS + 2, 2 * WIDTH), margin=1)
STUDY = padding.study_of("graphs", TASK, SETTINGS, CLAIMS, "K", "RMSE of the test boiling points, K, of each seed")

if __name__ == "__main__":
    study.run(STUDY, __doc__, RESULTS)
