"""Tests the data of the experiments: the embedded split, valid and damaged files, and the pipelines."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from grain.sharding import ShardOptions

from experiments.data import cifar
from experiments.data.images import IMAGES, LABELS, Labelled, embedded_digits, load, stratified_split
from experiments.data.pipeline import evaluation_batches, training_batches
from experiments.errors import ConfigError
from tests.support.programs import idx

FILES = {
    "train-images": "train-images-idx3-ubyte.gz",
    "train-labels": "train-labels-idx1-ubyte.gz",
    "test-images": "t10k-images-idx3-ubyte.gz",
    "test-labels": "t10k-labels-idx1-ubyte.gz",
}


def some_images(count: int, size: int = 28) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, size, size), np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Writes an MNIST-format folder with 20 training and 10 test images."""
    for part, count in (("train", 20), ("test", 10)):
        (tmp_path / FILES[f"{part}-images"]).write_bytes(gzip.compress(idx(IMAGES, some_images(count))))
        (tmp_path / FILES[f"{part}-labels"]).write_bytes(gzip.compress(idx(LABELS, np.arange(count) % 10)))
    return tmp_path


def test_reads_a_folder(folder: Path) -> None:
    train, test = load("fashion-mnist", folder)
    np.testing.assert_array_equal(train.images[..., 0], some_images(20))
    np.testing.assert_array_equal(test.labels, np.arange(10))
    assert train.images.shape == (20, 28, 28, 1)


def test_reads_unpacked_files(folder: Path) -> None:
    packed = load("fashion-mnist", folder)
    for name in FILES.values():
        (folder / name).with_suffix("").write_bytes(gzip.decompress((folder / name).read_bytes()))
        (folder / name).unlink()
    np.testing.assert_array_equal(load("fashion-mnist", folder).train.images, packed.train.images)


whole = gzip.compress(idx(IMAGES, some_images(20)))
DAMAGE = {
    "truncated archive": ("train-images", whole[: len(whole) // 2], "cannot be read"),
    "corrupt archive": ("train-images", whole[:100] + bytes(40) + whole[140:], "cannot be read"),
    "no archive": ("train-labels", b"<html>not found</html>", "cannot be read"),
    "empty file": ("train-labels", gzip.compress(b""), "magic number 0"),
    "truncated content": ("train-images", gzip.compress(idx(IMAGES, some_images(20))[:-1]), "truncated"),
    "truncated header": ("train-images", gzip.compress(idx(IMAGES, some_images(20))[:9]), "truncated"),
    "labels for images": ("train-images", gzip.compress(idx(LABELS, np.zeros(20))), "2049 (labels), expected 2051"),
    "images for labels": ("test-labels", gzip.compress(idx(IMAGES, some_images(10))), "2051 (images), expected 2049"),
    "another format": ("test-images", gzip.compress(b"PNG" * 99), "no MNIST-format file"),
    "fewer labels": ("train-labels", gzip.compress(idx(LABELS, np.zeros(19))), "20 images and 19 labels"),
    "no records": ("test-images", gzip.compress(idx(IMAGES, some_images(0))), "0 images"),
    "an eleventh class": ("test-labels", gzip.compress(idx(LABELS, np.full(10, 10))), "the label 10"),
    "another size": ("test-images", gzip.compress(idx(IMAGES, some_images(10, 32))), "(32, 32)"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_with_the_cure(folder: Path, damage: str) -> None:
    name, content, message = DAMAGE[damage]
    (folder / FILES[name]).write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load("fashion-mnist", folder)
    assert message in str(error.value)
    assert "apt install dataset-fashion-mnist" in str(error.value)


@pytest.mark.parametrize("missing", FILES)
def test_missing_file_is_named(folder: Path, missing: str) -> None:
    (folder / FILES[missing]).unlink()
    with pytest.raises(ConfigError, match=FILES[missing]):
        load("fashion-mnist", folder)


def test_unknown_data() -> None:
    with pytest.raises(ConfigError, match="unknown data 'cifar'"):
        load("cifar", Path())


@pytest.fixture(scope="module")
def digits() -> Labelled:
    return embedded_digits().test


def test_split_is_stratified_fixed_and_disjoint() -> None:
    split = embedded_digits()
    assert np.bincount(split.train.labels).tolist() == [400] * 10
    assert np.bincount(split.test.labels).tolist() == [100] * 10
    distinct = [{image.tobytes() for image in part.images} for part in split]
    assert not distinct[0] & distinct[1]
    whole = Labelled(*(np.concatenate(parts) for parts in zip(*split, strict=True)))
    first, second = (stratified_split(whole, 100) for _ in range(2))
    np.testing.assert_array_equal(first.test.images, second.test.images)


def test_training_batches_resume_where_they_stood(digits: Labelled) -> None:
    batches = training_batches(digits, 96, epochs=2, seed=3)
    for _ in range(13):
        next(batches)
    saved, expected = batches.get_state(), next(batches)
    again = training_batches(digits, 96, epochs=2, seed=3)
    again.set_state(saved)
    for name, part in next(again).items():
        np.testing.assert_array_equal(part, expected[name])


def test_epochs_differ_and_hold_each_record_once(digits: Labelled) -> None:
    labels = np.arange(1000, dtype=np.int32)  # names the records
    numbered = Labelled(digits.images, labels)
    batches = [batch["label"] for batch in training_batches(numbered, 100, epochs=2, seed=0)]
    first, second = np.concatenate(batches[:10]), np.concatenate(batches[10:])
    np.testing.assert_array_equal(np.sort(first), labels)
    np.testing.assert_array_equal(np.sort(second), labels)
    assert (first != second).mean() > 0.9


@pytest.mark.parametrize("records", [1000, 999, 990])
def test_processes_share_out_the_same_global_batches(digits: Labelled, records: int) -> None:
    data = Labelled(digits.images[:records], digits.labels[:records])
    together = training_batches(data, 100, epochs=2, seed=5)
    apart = [training_batches(data, 100, epochs=2, seed=5, shard=ShardOptions(index, 4)) for index in range(4)]
    for whole_batch, *parts in zip(together, *apart, strict=True):
        for name, values in whole_batch.items():
            for index, part in enumerate(parts):
                np.testing.assert_array_equal(part[name], values[index::4])


def test_every_second_image_is_mirrored(digits: Labelled) -> None:
    original = {image.tobytes(): label for image, label in zip(digits.images, digits.labels, strict=True)}
    (batch,) = training_batches(digits, len(digits.labels), epochs=1, seed=0, max_shift=0, flip=True)
    as_it_was = [original.get(image.tobytes()) for image in batch["image"]]
    mirrored = [original.get(image[:, ::-1].tobytes()) for image in batch["image"]]
    for label, *found in zip(batch["label"], as_it_was, mirrored, strict=True):
        assert label in found
    assert 0.4 < np.mean([found is None for found in as_it_was]) < 0.6


def cifar_folder(folder: Path, records: int = 4) -> Path:
    """Writes the six files of CIFAR-10 in small, with bytes that count up."""
    folder.mkdir(exist_ok=True)
    for number, name in enumerate([*cifar.FILES["train"], *cifar.FILES["test"]]):
        rows = np.arange(records * cifar.RECORD, dtype=np.int64).reshape(records, cifar.RECORD) % 251
        rows[:, 0] = (np.arange(records) + number) % 10
        (folder / name).write_bytes(rows.astype(np.uint8).tobytes())
    return folder


def test_reads_cifar(tmp_path: Path) -> None:
    folder = cifar_folder(tmp_path / cifar.FOLDER)
    train, test = load("cifar-10", folder)
    assert train.images.shape == (20, 32, 32, 3) and test.images.shape == (4, 32, 32, 3)
    np.testing.assert_array_equal(train.labels, [(i + n) % 10 for n in range(5) for i in range(4)])
    np.testing.assert_array_equal(test.labels, [5, 6, 7, 8])
    start = cifar.RECORD + 1  # of the second image: planes of red, green, blue, each row by row
    wanted = [(start + 1024 * plane + 32 * 3 + 7) % 251 for plane in range(3)]
    np.testing.assert_array_equal(train.images[1, 3, 7], wanted)
    above = load("cifar-10", tmp_path)  # the folder into which the archive was unpacked
    np.testing.assert_array_equal(above.train.images, train.images)


def test_damaged_cifar_is_named(tmp_path: Path) -> None:
    folder = cifar_folder(tmp_path)
    file = folder / "data_batch_3.bin"
    whole = file.read_bytes()
    for content, message in ((whole[:-1], "truncated"), (b"", "truncated"), (b"\x0a" + whole[1:], "has the label 10")):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=rf"data_batch_3.bin.*{message}.*cifar-10-binary.tar.gz"):
            load("cifar-10", folder)
    file.unlink()
    with pytest.raises(ConfigError, match=r"data_batch_3.bin cannot be read \(No such file"):
        load("cifar-10", folder)


def test_shifts_stay_within_two_pixels(digits: Labelled) -> None:
    dot = Labelled(np.zeros((50, 28, 28, 1), np.uint8), np.zeros(50, np.int32))
    dot.images[:, 14, 14] = 255
    images = next(training_batches(dot, 50, epochs=1, seed=0))["image"]
    rows, columns = np.argwhere(images[..., 0])[:, 1:].T
    assert set(rows) | set(columns) == {12, 13, 14, 15, 16}


@pytest.mark.parametrize("count", [1, 4])
def test_evaluation_counts_every_record_once(digits: Labelled, count: int) -> None:
    shards = [list(evaluation_batches(digits, 96, ShardOptions(index, count))) for index in range(count)]
    batches = [batch for shard in shards for batch in shard]
    assert {len(batch["weight"]) for batch in batches} == {96 // count}
    weights = np.concatenate([batch["weight"] for batch in batches])
    labels = np.concatenate([batch["label"] for batch in batches])
    assert weights.sum() == 1000
    np.testing.assert_array_equal(np.bincount(labels, weights), [100] * 10)
