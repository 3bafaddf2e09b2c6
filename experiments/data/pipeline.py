"""Builds Grain pipelines: deterministic, resumable training batches, and test batches that hold every record once.

The order and the random shifts depend on the seed and the epoch alone. With P processes, each builds the same global
sequence and reads every P-th record of it, so that all of them together see the same batch as one process would.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import grain
import numpy as np
from grain.sharding import NoSharding, ShardOptions

from experiments.data.images import Labelled

Record = dict[str, Any]
Batch = dict[str, Any]  # "label", "weight" and what the model takes, each `[N, ...]`
WHOLE = NoSharding()


class Records:
    """Gives Grain random access to labelled images. The first `real` records have weight one, the others
    are padding.
    """

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
    """Yields shuffled batches, in a new order each epoch; records that do not fill a last batch are left out of that
    epoch.

    Args:
        data: the training records.
        batch_size: records per batch over all processes together; a multiple of `shard.shard_count`.
        epochs: passes over the data.
        seed: seed of the order and of the shifts.
        max_shift: largest shift of an image each way, in pixels.
        flip: mirror each image with probability 1/2.
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
    """Yields all records in order, in batches of `batch_size`; the last one is padded with records of weight zero."""
    padding = -len(data.labels) % batch_size
    padded = Labelled(*(np.pad(part, [(0, padding)] + [(0, 0)] * (part.ndim - 1)) for part in data))
    records = grain.MapDataset.source(Records(padded, real=len(data.labels)))
    return iter(local_batches(records, batch_size, shard))


def local_batches(records: grain.MapDataset, batch_size: int, shard: ShardOptions) -> grain.MapDataset:
    """Takes this process's share of the records and batches it; the number of records must be a multiple of
    `batch_size`.
    """
    return records[shard.shard_index :: shard.shard_count].batch(batch_size // shard.shard_count)


def random_shift(record: Record, rng: np.random.Generator, max_shift: int) -> Record:
    """Shifts the image by up to `max_shift` random pixels each way and fills with zeros."""
    down, right = rng.integers(0, 2 * max_shift + 1, size=2)
    height, width, _ = record["image"].shape
    padded = np.pad(record["image"], ((max_shift, max_shift), (max_shift, max_shift), (0, 0)))
    return {**record, "image": padded[down : down + height, right : right + width]}


def random_flip(record: Record, rng: np.random.Generator) -> Record:
    """Mirrors the image left to right with probability 1/2."""
    return {**record, "image": record["image"][:, ::-1]} if rng.integers(2) else record
