"""Gives every data set of the experiments one form: its size, and its batches in training and evaluation."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from grain.sharding import ShardOptions

from experiments.data import images, pipeline
from experiments.data.photos import batches, sources
from experiments.data.pipeline import Batch

PHOTOS = "photos"


class DataSet(NamedTuple):
    """Images for training and evaluation."""

    train: int  # number of training images
    test: int  # number of test images
    classes: int
    shape: tuple[int, int, int]  # of an image: height, width, channels
    training: Callable[[int, int, int, ShardOptions], Any]  # (batch size, epochs, seed, shard) -> resumable iterator
    evaluation: Callable[[int, ShardOptions], Iterator[Batch]]  # (batch size, shard) -> each image once, then padding
    skipped: Mapping[str, str] = MappingProxyType({})  # images that could not be decoded so far: name and reason


def open_set(
    name: str,
    data_dir: Path,
    *,
    max_shift: int = 0,
    flip: bool = False,
    image_size: int = 224,
    workers: int = 0,
    damaged: batches.Damaged = "skip",
) -> DataSet:
    """Opens the data set of this name; `images.load` names those that fit into memory, and "photos" is any other.

    Args:
        name: "photos", or a name of `images.load`.
        data_dir: folder of its files.
        max_shift: largest random shift in training, in pixels; not of photos.
        flip: mirror every second training image; photos are always mirrored so.
        image_size: side of the crops of photos.
        workers: processes that decode photos.
        damaged: what to do with photos that cannot be decoded.

    Raises:
        ConfigError: a file is missing or damaged.
    """
    if name == PHOTOS:
        return photos(*sources.find(data_dir), image_size, workers, damaged)
    train, test = images.load(name, data_dir)

    def training(batch_size: int, epochs: int, seed: int, shard: ShardOptions) -> Any:
        options = dict(seed=seed, max_shift=max_shift, flip=flip, shard=shard)
        return pipeline.training_batches(train, batch_size, epochs, **options)

    def evaluation(batch_size: int, shard: ShardOptions) -> Iterator[Batch]:
        return pipeline.evaluation_batches(test, batch_size, shard)

    sizes = len(train.labels), len(test.labels)
    return DataSet(*sizes, images.CLASSES, train.images.shape[1:], training, evaluation)


def photos(train: sources.Source, test: sources.Source, size: int, workers: int, damaged: batches.Damaged) -> DataSet:
    """Returns the data set of two sources of image files."""
    skipped: dict[str, str] = {}
    options: dict[str, Any] = dict(size=size, workers=workers, damaged=damaged, skipped=skipped)

    def training(batch_size: int, epochs: int, seed: int, shard: ShardOptions) -> Any:
        return batches.training_batches(train, batch_size, epochs, seed=seed, shard=shard, **options)

    def evaluation(batch_size: int, shard: ShardOptions) -> Iterator[Batch]:
        return batches.evaluation_batches(test, batch_size, shard=shard, **options)

    return DataSet(len(train), len(test), len(train.classes), (size, size, 3), training, evaluation, skipped)
