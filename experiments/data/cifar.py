"""Reads CIFAR-10 from its six binary files; each holds 10,000 records of one label and 32×32 pixels in 3 channels."""

from pathlib import Path

import numpy as np

from experiments.errors import ConfigError

FOLDER = "cifar-10-batches-bin"  # what cifar-10-binary.tar.gz unpacks to
FILES = {"train": [f"data_batch_{number}.bin" for number in range(1, 6)], "test": ["test_batch.bin"]}
CHANNELS, SIZE, CLASSES = 3, 32, 10
RECORD = 1 + CHANNELS * SIZE * SIZE  # bytes
HOW_TO_GET = (
    "Expected the six files of cifar-10-binary.tar.gz (https://www.cs.toronto.edu/~kriz/cifar.html), unpacked: "
    "data_batch_1.bin to data_batch_5.bin and test_batch.bin; give their folder with --data-dir"
)


def read(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads images `[N, 32, 32, 3]` uint8 and labels `[N]` int32 of `part`, which is "train" or "test".

    The files lie in `folder` or in its subfolder `cifar-10-batches-bin`.
    """
    inside = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    records = np.concatenate([read_records(inside / name) for name in FILES[part]])
    images = records[:, 1:].reshape(-1, CHANNELS, SIZE, SIZE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), records[:, 0].astype(np.int32)


def read_records(path: Path) -> np.ndarray:
    """Reads one file as records `[N, 3073]` uint8; raises ConfigError if it is truncated or holds an unknown label."""
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}). {HOW_TO_GET}") from error
    if not len(content) or len(content) % RECORD:
        raise ConfigError(f"{path}: {len(content)} bytes, expected a multiple of {RECORD}: truncated? {HOW_TO_GET}")
    records = content.reshape(-1, RECORD)
    if records[:, 0].max() >= CLASSES:
        raise ConfigError(f"{path} has the label {records[:, 0].max()}, expected 0 to {CLASSES - 1}. {HOW_TO_GET}")
    return records
