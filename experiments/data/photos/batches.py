"""Builds Grain pipelines over image files, which worker processes decode and crop.

As in `data/pipeline.py` the order and the crops depend on the seed and the epoch alone, and P processes together see
the batches that one would. The position is the number of batches read, so that any number of workers and processes can
go on there.
"""

from collections.abc import Iterator
from typing import Any, Literal, Self

import grain
import numpy as np
from absl import flags
from grain.sharding import NoSharding, ShardOptions
from tqdm import tqdm

from experiments.data.photos.augment import centre_crop, decode, random_crop
from experiments.data.photos.sources import Source
from experiments.data.pipeline import local_batches
from experiments.errors import RunError

Damaged = Literal["skip", "error"]
WHOLE = NoSharding()
INTACT = -1  # in the field `damaged`; otherwise the number of the damaged image
THREADS = 4  # that read batches in each worker
REPLACEMENTS = 100  # images that are tried in place of a damaged one


class Train(grain.transforms.RandomMap):
    """Decodes an image and takes a random crop; in place of a damaged image the next one that is whole."""

    def __init__(self, source: Source, size: int):
        self.source, self.size = source, size

    def random_map(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        for step in range(REPLACEMENTS):
            file = self.source[(index + step) % len(self.source)]
            try:
                pixels = random_crop(decode(file.content), self.size, rng)
            except ValueError:
                continue
            return record(pixels, file.label, 1, index if step else INTACT)
        return record(np.zeros((self.size, self.size, 3), np.uint8), 0, 0, index)


class Test(grain.transforms.Map):
    """Decodes an image and takes its centre; padding and damaged images have weight zero."""

    def __init__(self, source: Source, size: int):
        self.source, self.size = source, size

    def map(self, index: int) -> dict[str, Any]:
        nothing = np.zeros((self.size, self.size, 3), np.uint8)
        if index >= len(self.source):
            return record(nothing, 0, 0, INTACT)
        file = self.source[index]
        try:
            return record(centre_crop(decode(file.content), self.size), file.label, 1, INTACT)
        except ValueError:
            return record(nothing, 0, 0, index)


def record(pixels: np.ndarray, label: int, weight: int, damaged: int) -> dict[str, Any]:
    """Returns an element of a batch."""
    return {"image": pixels, "label": np.int32(label), "weight": np.float32(weight), "damaged": np.int64(damaged)}


def training_batches(
    source: Source,
    batch_size: int,
    epochs: int,
    *,
    seed: int,
    size: int,
    workers: int,
    damaged: Damaged = "skip",
    shard: ShardOptions = WHOLE,
    skipped: dict[str, str] | None = None,
) -> "Batches":
    """Returns an iterator over shuffled batches `{image, label, weight}` of random crops.

    Args:
        source: the image files.
        batch_size: images per batch over all processes together; those that do not fill a last batch are left out of
            the epoch.
        epochs: passes over the images.
        seed: seed of the order and of the crops.
        size: side of the crops.
        workers: processes that decode; 0 decodes in threads of this one.
        damaged: "skip" takes the next image in place of one that cannot be decoded, and counts it; "error" ends.
        shard: the part of each batch that this process reads.
        skipped: is filled with the names of damaged images and the reasons; those that it holds are known already.
    """
    numbers = grain.MapDataset.range(len(source)).seed(seed).shuffle()
    crops = numbers.random_map(Train(source, size))[: len(source) // batch_size * batch_size]
    return Batches(local_batches(crops, batch_size, shard).repeat(epochs), source, workers, damaged, skipped)


def evaluation_batches(
    source: Source,
    batch_size: int,
    *,
    size: int,
    workers: int,
    damaged: Damaged = "skip",
    shard: ShardOptions = WHOLE,
    skipped: dict[str, str] | None = None,
) -> "Batches":
    """Returns an iterator over all images in order, in batches that records of weight zero fill up."""
    crops = grain.MapDataset.range(len(source) + -len(source) % batch_size).map(Test(source, size))
    return Batches(local_batches(crops, batch_size, shard), source, workers, damaged, skipped)


class Batches(Iterator[dict[str, Any]]):
    """Iterates over batches, counts those that were read, and names the damaged images among them."""

    def __init__(
        self,
        dataset: grain.MapDataset,
        source: Source,
        workers: int,
        damaged: Damaged,
        skipped: dict[str, str] | None = None,
    ):
        self._dataset, self._source, self._workers, self._damaged = dataset, source, workers, damaged
        self._position, self._iterator = 0, None
        self.skipped = {} if skipped is None else skipped  # the damaged images so far: name and reason

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, Any]:
        if self._iterator is None:
            rest = self._dataset[self._position :]
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain's workers read options of absl, which this command line has not
            read = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=2 * THREADS)
            options = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=2)
            self._iterator = iter(rest.to_iter_dataset(read).mp_prefetch(options))
        try:
            batch = next(self._iterator)
        except StopIteration:
            self.close()
            self._position = len(self._dataset)
            raise
        self._position += 1
        for number in batch.pop("damaged"):
            if number != INTACT:
                self._note(int(number))
        return batch

    def _note(self, number: int) -> None:
        """Names a damaged image once, or ends the run by it."""
        file = self._source[number]
        if file.name in self.skipped:
            return
        try:
            decode(file.content)
            reason = "it could not be read before, and can be now"
        except ValueError as error:
            reason = str(error)
        if self._damaged == "error":
            raise RunError(f"{file.name} cannot be decoded ({reason}): replace it, or write --damaged skip")
        self.skipped[file.name] = reason
        tqdm.write(f"skipped {file.name}: it cannot be decoded ({reason})")

    def get_state(self) -> dict[str, int]:
        """Returns the position: how many batches were read, equal in every process."""
        return {"batches": self._position}

    def set_state(self, state: dict[str, int]) -> None:
        """Moves to a position."""
        self.close()
        self._position = state["batches"]

    def close(self) -> None:
        """Ends the worker processes."""
        if self._iterator is not None and hasattr(self._iterator, "close"):
            self._iterator.close()
        self._iterator = None
