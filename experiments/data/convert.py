"""Converts a folder of images by class to ArrayRecord files: `python -m experiments.data.convert FOLDER OUT`.

A million small files are slow to list and to read on network disks; some hundred large ones are not. The records are
`tf.train.Example` with image, label and file_name, as TFDS writes them, in a random order that is always the same.
"""

import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import grain
import numpy as np
import tyro
from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from experiments.data.photos.augment import decode
from experiments.data.photos.example import pack
from experiments.data.photos.sources import CLASSES, LAYOUT, UNFINISHED, Folder, folder_of
from experiments.errors import ConfigError, RunError

GROUP = "group_size:1"  # records that are compressed together; 1, because they are read in random order


def convert(
    folder: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    shards: int = 128,
    damaged: Literal["skip", "error"] = "skip",
) -> None:
    """Converts a folder of images by class to ArrayRecord files, for --data-dir of experiments.train.

    Args:
        folder: holds train/CLASS/*.jpg and val/CLASS/*.jpg.
        out: folder of the ArrayRecord files and of classes.txt; is made, and must be empty.
        shards: files of the training images; the test images have as many in proportion.
        damaged: skip leaves images out that cannot be decoded, and names them; error ends at the first.
    """
    parts = {part: folder_of(folder, part) for part in ("train", "test")}
    if shards < 1:
        raise ConfigError(f"--shards {shards}: expected a positive number")
    if not all(parts.values()):
        raise ConfigError(f"{folder} holds no {'/'.join(part for part in parts if not parts[part])} images. {LAYOUT}")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty: choose another folder, or remove it")
    train = Folder(parts["train"])
    sources = {"train": train, "val": Folder(parts["test"], train.classes)}
    out.mkdir(parents=True, exist_ok=True)
    for part, source in sources.items():
        files = max(1, min(len(source), round(shards * len(source) / len(train))))
        lost = sum(write(source, out / f"{part}.array_record", files, damaged))
        print(f"{part}: {len(source) - lost} images in {files} files" + f", {lost} damaged ones left out" * (lost > 0))
    (out / CLASSES[0]).write_text("".join(f"{name}\n" for name in train.classes))


def write(source: Folder, path: Path, files: int, damaged: str) -> Iterator[int]:
    """Writes the images in random order to PATH-00000-of-N and so on; yields how many each file has left out.

    Threads read and decode ahead. A file gets its name when it is whole.
    """
    order = np.random.default_rng(0).permutation(len(source))
    ahead = grain.ReadOptions(num_threads=os.cpu_count() or 1, prefetch_buffer_size=64)
    with tqdm(total=len(source), unit="image", desc=path.name, disable=None) as bar:
        for number in range(files):
            name = f"{path.name}-{number:05d}-of-{files:05d}"
            writer, lost = ArrayRecordWriter(str(path.with_name(name + UNFINISHED)), GROUP), 0
            checked = grain.MapDataset.source(order[number::files]).map(partial(check, source))
            for record, reason in checked.to_iter_dataset(ahead):
                bar.update()
                if not reason:
                    writer.write(record)
                elif damaged == "error":
                    raise RunError(f"{reason}: replace it, or write --damaged skip")
                else:
                    tqdm.write(f"left out: {reason}")
                    lost += 1
            writer.close()
            path.with_name(name + UNFINISHED).rename(path.with_name(name))
            yield lost


def check(source: Folder, number: int) -> tuple[bytes, str]:
    """Returns the record of an image, and an empty text; or why it is damaged."""
    file = source[int(number)]
    try:
        decode(file.content)
    except ValueError as error:
        return b"", f"{file.name} cannot be decoded ({error})"
    return pack(*file), ""


def main() -> int:
    """Runs the command line, and returns the exit status."""
    try:
        tyro.cli(convert, prog="python -m experiments.data.convert")
    except (ConfigError, RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
