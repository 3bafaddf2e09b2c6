"""Tests that batches of photographs do not depend on workers and processes, and that every image counts once."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grain.sharding import ShardOptions

from experiments.data import convert
from experiments.data.photos.batches import Batches, evaluation_batches, training_batches
from experiments.data.photos.sources import Source, find
from experiments.errors import RunError
from tests.experiments.photos.photographs import PHOTOGRAPHS, write_folder

SIZE, BATCH, TRAIN, TEST = 16, 8, 14, 7  # images of each class: 42 and 21, which no batch of 8 divides


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("photos") / "folder", TRAIN, TEST)


@pytest.fixture(scope="module")
def records(folder: Path) -> Path:
    convert.convert(folder, folder.parent / "records", shards=3)
    return folder.parent / "records"


@pytest.fixture(scope="module", params=["folder", "records"])
def sources(request: pytest.FixtureRequest) -> tuple[Source, Source]:
    return find(request.getfixturevalue(request.param))


def training(source: Source, **options: Any) -> Batches:
    return training_batches(source, BATCH, 2, size=SIZE, **{"seed": 3, "workers": 0} | options)


def evaluation(source: Source, **options: Any) -> Batches:
    return evaluation_batches(source, BATCH, size=SIZE, **{"workers": 0} | options)


def assert_equal(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys() == {"image", "label", "weight"}
    for name, values in found.items():
        np.testing.assert_array_equal(values, wanted[name], err_msg=name)


def test_training_batches(sources: tuple[Source, Source]) -> None:
    batches = list(training(sources[0]))
    assert len(batches) == 2 * (3 * TRAIN // BATCH)
    for batch in batches:
        assert batch["image"].shape == (BATCH, SIZE, SIZE, 3) and batch["image"].dtype == np.uint8
        assert batch["label"].dtype == np.int32 and (batch["weight"] == 1).all()
    seen = [image.tobytes() for batch in batches for image in batch["image"]]
    assert len(set(seen)) == len(seen), "a crop came twice"
    assert np.mean([image.std() for batch in batches for image in batch["image"]]) > 10, "no photographs"


def test_folder_and_records_hold_the_same(folder: Path, records: Path) -> None:
    for one, other in zip(find(folder), find(records), strict=True):
        assert one.classes == other.classes == sorted(PHOTOGRAPHS)
        listed, converted = ([source[index] for index in range(len(source))] for source in (one, other))
        assert listed == sorted(converted, key=lambda file: file.name) != converted


@pytest.mark.parametrize("count", [1, 4])
def test_evaluation_counts_every_image_once(sources: tuple[Source, Source], count: int) -> None:
    shards = [list(evaluation(sources[1], shard=ShardOptions(index, count))) for index in range(count)]
    batches = [batch for shard in shards for batch in shard]
    assert {len(batch["weight"]) for batch in batches} == {BATCH // count}
    assert len({len(shard) for shard in shards}) == 1, "a process has fewer batches"
    weights, labels = (np.concatenate([batch[name] for batch in batches]) for name in ("weight", "label"))
    np.testing.assert_array_equal(np.bincount(labels, weights), [TEST] * len(PHOTOGRAPHS))


def test_processes_share_out_the_same_global_batches(sources: tuple[Source, Source]) -> None:
    apart = [training(sources[0], shard=ShardOptions(index, 4)) for index in range(4)]
    for whole, *parts in zip(training(sources[0]), *apart, strict=True):
        for name, values in whole.items():
            for index, part in enumerate(parts):
                np.testing.assert_array_equal(part[name], values[index::4])


@pytest.mark.parametrize("position", [0, 3, 7])
def test_batches_resume_where_they_stood(sources: tuple[Source, Source], position: int) -> None:
    batches = training(sources[0])
    wanted = list(islice(batches, position, None))
    again = training(sources[0])
    next(again)
    again.set_state({"batches": position})
    for found, batch in zip(again, wanted, strict=True):
        assert_equal(found, batch)
    assert again.get_state() == batches.get_state() == {"batches": 10}


def test_worker_processes_give_the_same_and_resume(sources: tuple[Source, Source]) -> None:
    wanted, many = list(training(sources[0])), training(sources[0], workers=2)
    many.set_state({"batches": 3})
    try:
        for found, batch in zip(many, wanted[3:], strict=True):
            assert_equal(found, batch)
    finally:
        many.close()


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Returns a folder in which one training image is cut short, one is no image, and one test image is empty."""
    folder = write_folder(tmp_path / "damaged", TRAIN, TEST)
    cut = folder / "train/flower/0003.jpg"
    cut.write_bytes(cut.read_bytes()[:500])
    (folder / "train/person/0001.jpg").write_text("<html>not found</html>")
    (folder / "val/person/0002.jpg").write_bytes(b"")
    return folder


def test_damaged_images_are_skipped_by_name(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, test = find(damaged)
    batches, last = training(train), evaluation(test)
    assert all((batch["weight"] == 1).all() for batch in batches), "another image stands in"
    assert sorted(batches.skipped) == ["flower/0003.jpg", "person/0001.jpg"]
    assert sum(batch["weight"].sum() for batch in last) == 3 * TEST - 1
    assert list(last.skipped) == ["person/0002.jpg"]
    text = capsys.readouterr()
    assert (text.out + text.err).count("skipped flower/0003.jpg: it cannot be decoded (") == 1


def test_damaged_images_are_an_error_by_option(damaged: Path) -> None:
    with pytest.raises(RunError, match=r"^(flower/0003|person/0001)\.jpg cannot be decoded \(.+\): .* --damaged skip$"):
        list(training(find(damaged)[0], damaged="error"))


def test_converting_keeps_damaged_images_out_or_ends(damaged: Path, tmp_path: Path) -> None:
    convert.convert(damaged, tmp_path / "records", shards=1)
    train, test = find(tmp_path / "records")
    assert (len(train), len(test)) == (3 * TRAIN - 2, 3 * TEST - 1)
    with pytest.raises(RunError, match=r"flower/0003\.jpg cannot be decoded"):
        convert.convert(damaged, tmp_path / "again", damaged="error")


def resident() -> int:
    """Returns the resident memory of this process, in bytes."""
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


@pytest.mark.slow
def test_memory_stays_flat(sources: tuple[Source, Source]) -> None:
    """Reads 4,000 batches; keeping one of the crops of each would take 3 MB, keeping their files ten times as much."""
    batches: Iterator[dict[str, Any]] = training_batches(sources[0], BATCH, 801, seed=0, size=SIZE, workers=0)
    list(islice(batches, 1000))
    before = resident()
    for _ in islice(batches, 3000):
        pass
    assert resident() - before < 2 * 2**20
