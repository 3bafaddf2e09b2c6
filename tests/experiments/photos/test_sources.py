"""Tests how image files are found and packed, and that what is wrong with a data set is named."""

import shutil
from pathlib import Path

import grain
import numpy as np
import pytest
from PIL import Image

from experiments.data import convert
from experiments.data.photos.augment import centre_box, centre_crop, decode, random_box
from experiments.data.photos.example import pack, unpack
from experiments.data.photos.sources import find
from experiments.errors import ConfigError
from tests.experiments.photos.photographs import PHOTOGRAPHS, photograph, write_folder


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder that holds the images as files, in `folder`, and as ArrayRecord, in `records`."""
    top = tmp_path_factory.mktemp("sets")
    write_folder(top / "folder", train=4, test=2, side=16)
    convert.convert(top / "folder", top / "records", shards=2)
    return top


@pytest.fixture
def sets(originals: Path, tmp_path: Path) -> Path:
    """Returns a copy of them, to be damaged."""
    return shutil.copytree(originals, tmp_path / "sets")


def test_records_are_packed_and_unpacked() -> None:
    assert unpack(pack(b"\x00\xff", 999, "n01440764/ü.JPEG")) == (b"\x00\xff", 999, "n01440764/ü.JPEG")
    for record, message in ((b"\xff" * 9, "no tf.train.Example"), (b"", "expected the features image and label")):
        with pytest.raises(ValueError, match=message):
            unpack(record)


def test_a_record_is_that_of_the_published_format() -> None:
    """Checks the bytes against the wire format by hand: field 1 (features), 1 (an entry), 1 (key) and 2 (value)."""
    entry = b"\x0a\x05label" + b"\x12\x05\x1a\x03\x0a\x01\x07"  # value: int64_list (3) of the packed varint 7
    assert b"\x0a" + bytes([len(entry)]) + entry in pack(b"", 7, "")


def test_files_in_a_folder(sets: Path) -> None:
    (sets / "folder/train/flower/README.txt").write_text("no image")
    (sets / "folder/train/flower/4000.PNG").write_bytes(b"")
    train, test = find(sets / "folder")
    assert train.classes == test.classes == sorted(PHOTOGRAPHS)
    names = [train[index].name for index in range(len(train))]
    assert names == sorted(names) and len(names) == 13 and "flower/4000.PNG" in names
    assert [test[index].label for index in range(6)] == [0, 0, 1, 1, 2, 2]


def test_a_class_that_has_no_test_images(sets: Path) -> None:
    shutil.rmtree(sets / "folder/val/building")
    test = find(sets / "folder")[1]
    assert [test[index].label for index in range(4)] == [1, 1, 2, 2]


def cut(sets: Path) -> Path:
    path = sorted((sets / "records").glob("train*"))[0]
    path.write_bytes(path.read_bytes()[:-100])
    return sets / "records"


def one_less(sets: Path) -> Path:
    sorted((sets / "records").glob("train*"))[0].unlink()
    return sets / "records"


def no_names(sets: Path) -> Path:
    (sets / "records/classes.txt").unlink()
    return sets / "records"


def foreign(sets: Path) -> Path:
    for path in (sets / "records").glob("train*"):
        writer = convert.ArrayRecordWriter(str(path), convert.GROUP)
        writer.write(b"a text")
        writer.close()
    return sets / "records"


def another_class(sets: Path) -> Path:
    (sets / "folder/val/dog").mkdir()
    return sets / "folder"


def no_test(sets: Path) -> Path:
    shutil.rmtree(sets / "folder/val")
    return sets / "folder"


def empty(sets: Path) -> Path:
    for path in (sets / "folder/train").rglob("*.jpg"):
        path.unlink()
    return sets / "folder"


def nowhere(sets: Path) -> Path:
    return sets / "nowhere"


WRONG = {
    "truncated or damaged. Copy it": cut,
    "holds 1 of the 2 files like train.array_record-00001-of-00002": one_less,
    "holds neither classes.txt nor label.labels.txt": no_names,
    "Expected records tf.train.Example": foreign,
    "has the class 'dog', which the training images do not have": another_class,
    "holds no test images": no_test,
    "holds no images (.bmp, .jpeg": empty,
    "is no folder": nowhere,
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_is_named(sets: Path, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        find(WRONG[message](sets))
    assert message in str(error.value)


def test_a_record_with_a_wrong_label_is_a_damaged_image(sets: Path) -> None:
    (path, *others) = sorted((sets / "records").glob("val*"))
    writer = convert.ArrayRecordWriter(str(path), convert.GROUP)
    for record in (pack(b"x", 0, "a"), pack(b"x", 3, "b"), pack(b"x", -1, ""), b"\xff" * 9):
        writer.write(record)
    writer.close()
    test = find(sets / "records")[1]
    assert not others and [test[index] for index in range(4)] == [
        (b"x", 0, "a"),
        (b"", 0, "b (label 3, of 3 classes)"),
        (b"", 0, "record 2 (label -1, of 3 classes)"),
        (b"", 0, "record 3 (no tf.train.Example)"),
    ]


def test_converting_is_repeatable_and_refuses_what_it_cannot_do(sets: Path, tmp_path: Path) -> None:
    convert.convert(sets / "folder", tmp_path / "again", shards=2)
    for path in (sets / "records").iterdir():
        there = grain.sources.ArrayRecordDataSource([str(path)]) if "array" in path.name else [path.read_text()]
        again = tmp_path / "again" / path.name
        copy = grain.sources.ArrayRecordDataSource([str(again)]) if "array" in path.name else [again.read_text()]
        assert [there[index] for index in range(len(there))] == [copy[index] for index in range(len(copy))]
    with pytest.raises(ConfigError, match="is not empty"):
        convert.convert(sets / "folder", tmp_path / "again")
    with pytest.raises(ConfigError, match="holds no train/test images"):
        convert.convert(sets / "records", tmp_path / "other")
    with pytest.raises(ConfigError, match="--shards 0: expected a positive number"):
        convert.convert(sets / "folder", tmp_path / "other", shards=0)


@pytest.mark.parametrize(("width", "height"), [(500, 375), (1, 1), (3, 900)])
def test_random_boxes_lie_inside(width: int, height: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        left, upper, right, lower = random_box(width, height, rng)
        assert 0 <= left < right <= width and 0 <= upper < lower <= height


def test_random_boxes_have_the_areas_and_ratios_of_the_paper() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([random_box(400, 400, rng) for _ in range(2000)])
    wide, high = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, ratio = wide * high / 400**2, wide / high
    assert 0.075 < area.min() < 0.1 and 0.95 < area.max() <= 1
    assert 0.72 < ratio.min() < 0.77 and 1.30 < ratio.max() < 1.39
    assert abs(np.log(ratio).mean()) < 0.02


def test_the_centre() -> None:
    assert centre_box(500, 375, 0.875) == (86, 23, 414, 351)
    whole = photograph("flower").resize((640, 427))
    wanted = np.asarray(whole.crop((133, 26, 507, 400)).resize((32, 32), Image.Resampling.BILINEAR), float)
    assert np.abs(centre_crop(whole, 32) - wanted).mean() < 2  # the filter sees the pixels around the box


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_any_kind_of_image_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    photograph("person").resize((8, 8)).convert("L" if mode == "I;16" else "RGB").convert(mode).save(path)
    assert decode(path.read_bytes()).mode == "RGB"
