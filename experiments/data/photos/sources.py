"""Finds the image files of a data set, and gives random access to them: a folder per class, or ArrayRecord files."""

import os
import re
from pathlib import Path
from typing import NamedTuple, Protocol

import grain
import numpy as np

from experiments.data.photos.example import unpack
from experiments.errors import ConfigError

IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
PARTS = {"train": ("train", "training"), "test": ("val", "validation", "test")}  # names of folders and of files
CLASSES = ("classes.txt", "label.labels.txt")  # one name a line; the second is what TFDS writes
UNFINISHED = ".unfinished"  # ends the name of a file that is being written
LAYOUT = (
    "Expected DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg, or *train*.array_record* and *val*.array_record* in DIR "
    "with the names of the classes in classes.txt; give DIR with --data-dir"
)


class File(NamedTuple):
    """An image file, not yet decoded."""

    content: bytes
    label: int
    name: str


class Source(Protocol):
    """Image files by number, in an order that is the same on every machine."""

    classes: list[str]

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> File: ...


class Folder:
    """The image files in the subfolders of a folder; the sorted names of the subfolders are the classes."""

    def __init__(self, folder: Path, classes: list[str] | None = None):
        """Lists the files.

        Args:
            folder: holds a subfolder for each class.
            classes: the classes of the training images, which those of a test must be among.

        Raises:
            ConfigError: there are no images, or another class than in training.
        """
        found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        self.folder, self.classes = folder, classes or found
        if unknown := sorted(set(found) - set(self.classes)):
            raise ConfigError(f"{folder} has the class {unknown[0]!r}, which the training images do not have. {LAYOUT}")
        names, labels = [], []
        for label, name in enumerate(self.classes):
            inside = folder / name
            files = sorted(entry.name for entry in os.scandir(inside) if is_image(entry)) if inside.is_dir() else []
            names += [f"{name}/{file}".encode() for file in files]
            labels += [label] * len(files)
        if not names:
            raise ConfigError(f"{folder} holds no images ({', '.join(sorted(IMAGES))}). {LAYOUT}")
        # Arrays, because a million Python strings take 100 MB in every worker process.
        self._names, self._labels = np.array(names, "S"), np.array(labels, np.int32)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> File:
        name = self._names[index].decode()
        try:
            content = (self.folder / name).read_bytes()
        except OSError:
            content = b""  # no image: counted as damaged, by name
        return File(content, int(self._labels[index]), name)


class Records:
    """The image files in ArrayRecord files that hold `tf.train.Example`, as those of TFDS do."""

    def __init__(self, paths: list[Path], classes: list[str]):
        """Opens the files and counts their records.

        Raises:
            ConfigError: a file is damaged, or its records are no images with labels.
        """
        self.paths, self.classes = paths, classes
        for path in paths:
            try:
                len(grain.sources.ArrayRecordDataSource([str(path)]))
            except Exception as error:  # ArrayRecord raises RuntimeError, ValueError or SystemError
                raise ConfigError(
                    f"{path} cannot be read ({' '.join(str(error).split())[:200]}): truncated or damaged. Copy it or "
                    "convert it again (python -m experiments.data.convert)"
                ) from error
        self._records = grain.sources.ArrayRecordDataSource([str(path) for path in paths])
        if not len(self._records):
            raise ConfigError(f"{paths[0].parent} holds no records. {LAYOUT}")
        first = self[0]
        if not first.content:
            raise ConfigError(f"{paths[0]}: {first.name}. Expected records tf.train.Example as TFDS writes them")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> File:
        try:
            image, label, name = unpack(self._records[index])
        except Exception as error:
            return File(b"", 0, f"record {index} ({' '.join(str(error).split())[:200]})")
        if not 0 <= label < len(self.classes):
            return File(b"", 0, f"{name or f'record {index}'} (label {label}, of {len(self.classes)} classes)")
        return File(image, label, name or f"record {index}")


def find(data_dir: Path) -> tuple[Source, Source]:
    """Returns the training and the test images in a folder, whichever of the two layouts it has.

    Raises:
        ConfigError: it has none of them, or a file that cannot be used.
    """
    if not data_dir.is_dir():
        raise ConfigError(f"{data_dir} is no folder. {LAYOUT}")
    train, test = (folder_of(data_dir, part) for part in PARTS)
    if train and test:
        images = Folder(train)
        return images, Folder(test, images.classes)
    train_files, test_files = (files_of(data_dir, part) for part in PARTS)
    if train_files and test_files:
        classes = class_names(data_dir)
        return Records(train_files, classes), Records(test_files, classes)
    missing = "test" if train or train_files else "training"
    raise ConfigError(f"{data_dir} holds no {missing} images. {LAYOUT}")


def folder_of(data_dir: Path, part: str) -> Path | None:
    """Returns the folder of a part, or None."""
    return next((data_dir / name for name in PARTS[part] if (data_dir / name).is_dir()), None)


def files_of(data_dir: Path, part: str) -> list[Path]:
    """Returns the ArrayRecord files of a part, sorted by name.

    Raises:
        ConfigError: of the files NAME-00000-of-00128 and so on some are missing.
    """
    whole = [path for path in data_dir.glob("*.array_record*") if not path.name.endswith(UNFINISHED)]
    for name in PARTS[part]:
        if found := sorted(path for path in whole if name in path.name):
            count = re.search(r"-of-(\d+)$", found[0].name)
            if count and len(found) != int(count[1]):
                raise ConfigError(f"{data_dir} holds {len(found)} of the {int(count[1])} files like {found[0].name}")
            return found
    return []


def class_names(data_dir: Path) -> list[str]:
    """Returns the names of the classes that stand beside ArrayRecord files."""
    for name in CLASSES:
        if (data_dir / name).is_file():
            return (data_dir / name).read_text().splitlines()
    raise ConfigError(f"{data_dir} holds neither {CLASSES[0]} nor {CLASSES[1]}. {LAYOUT}")


def is_image(entry: os.DirEntry[str]) -> bool:
    """Returns True for a file whose name says that it is an image."""
    return entry.is_file() and Path(entry.name).suffix.lower() in IMAGES
