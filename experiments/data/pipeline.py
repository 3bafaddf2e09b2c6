"""Grain pipelines: deterministic, resumable batches of training records, and every test record exactly once.

The order and the shifts depend on the seed and the epoch alone. Every process builds the same global sequence and
takes each P-th record of it, so P processes together see in each step the records that one process would see.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import grain
import numpy as np
from grain.sharding import NoSharding, ShardOptions

from experiments.data.images import Labelled

Record = dict[str, Any]
WHOLE = NoSharding()


class Records:
    """Random access to labelled images for Grain. The first `real` records have weight one, the others are padding."""

    def __init__(self, data: Labelled, real: int | None = None):
        self.data, self.real = data, len(data.labels) if real is None else real

    def __len__(self) -> int:
        return len(self.data.labels)

    def __getitem__(self, index: int) -> Record:
        weight = np.float32(index < self.real)
        return {"image": self.data.images[index], "label": self.data.labels[index], "weight": weight}


def training_batches(
    data: Labelled,
    batch_size: int,
    epochs: int,
    *,
    seed: int,
    max_shift: int = 2,
    flip: bool = False,
    shard: ShardOptions = WHOLE,
) -> grain.DatasetIterator:
    """Shuffled batches, in a new order in each epoch; a remainder that fills no batch is left out of that epoch.

    Args:
        data: the training records.
        batch_size: of all the processes together; a multiple of `shard.shard_count`.
        epochs: passes over the data.
        seed: of the order and of the shifts.
        max_shift: how many pixels an image moves each way at most.
        flip: mirror every second image.
        shard: the part of each batch that this process reads.

    Returns:
        An iterator over `{image, label, weight}`, whose position `get_state` and `set_state` save and restore.
    """
    records = grain.MapDataset.source(Records(data)).seed(seed).shuffle()
    if max_shift:
        records = records.random_map(partial(random_shift, max_shift=max_shift))
    if flip:
        records = records.random_map(random_flip)
    whole = len(records) // batch_size * batch_size
    batches = local_batches(records[:whole], batch_size, shard).repeat(epochs)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))


def evaluation_batches(data: Labelled, batch_size: int, shard: ShardOptions = WHOLE) -> Iterator[Record]:
    """Batches in order, the last one filled up with records of weight zero."""
    padding = -len(data.labels) % batch_size
    padded = Labelled(*(np.pad(part, [(0, padding)] + [(0, 0)] * (part.ndim - 1)) for part in data))
    records = grain.MapDataset.source(Records(padded, real=len(data.labels)))
    return iter(local_batches(records, batch_size, shard))


def local_batches(records: grain.MapDataset, batch_size: int, shard: ShardOptions) -> grain.MapDataset:
    """This process's part of each batch; the records fill whole batches."""
    return records[shard.shard_index :: shard.shard_count].batch(batch_size // shard.shard_count)


def random_shift(record: Record, rng: np.random.Generator, max_shift: int) -> Record:
    """Moves the image by up to `max_shift` pixels each way over a background of zeros."""
    down, right = rng.integers(0, 2 * max_shift + 1, size=2)
    height, width, _ = record["image"].shape
    padded = np.pad(record["image"], ((max_shift, max_shift), (max_shift, max_shift), (0, 0)))
    return {**record, "image": padded[down : down + height, right : right + width]}


def random_flip(record: Record, rng: np.random.Generator) -> Record:
    """Mirrors the image, left to right, or leaves it."""
    return {**record, "image": record["image"][:, ::-1]} if rng.integers(2) else record
