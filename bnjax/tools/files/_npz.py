"""The arrays of an .npz file: every member named, bounded and checked, none unpickled."""

import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from bnjax.tools.convert._correspondence import Array

_MOST_OF_DEFLATE = 1032  # no deflated byte stands for more, so that the size of a file bounds what comes out of it
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_npz(file: Path) -> dict[str, Array]:
    """The arrays by name."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            names = [member.filename for member in members]
            if len(set(names)) < len(names):
                twice = next(name for i, name in enumerate(names) if name in names[:i])
                raise ValueError(f"{file.name} has two members {twice!r}.")
            return {m.filename.removesuffix(".npy"): _member(file, archive, m) for m in members}
    except zipfile.BadZipFile as error:
        raise ValueError(f"{file.name} is no sound .npz file: {error}.") from error


def opened(file: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> IO[bytes]:
    """A member to read from, once its sizes are possible; raises ValueError where they are not."""
    if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{file.name}: member {member.filename!r} is encrypted, or compressed in an uncommon way.")
    if member.file_size > _MOST_OF_DEFLATE * member.compress_size or member.compress_size > file.stat().st_size:
        raise ValueError(
            f"{file.name}: member {member.filename!r} claims {member.file_size} bytes out of {member.compress_size} in "
            f"a file of {file.stat().st_size}."
        )
    return archive.open(member)


def _member(file: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Array:
    where = f"{file.name}: member {member.filename!r}"
    if not member.filename.endswith(".npy"):
        raise ValueError(f"{where} is no .npy array.")
    try:
        with opened(file, archive, member) as stream:
            version = np.lib.format.read_magic(stream)
            if version not in _HEADERS:
                raise ValueError(f"{where} has version {version} of the format, which plain arrays do not need.")
            shape, by_columns, dtype = _HEADERS[version](stream)
            if dtype.hasobject or dtype.names:
                raise ValueError(f"{where} holds {dtype}, no numbers: only pickles would bring such back.")
            return _array(where, stream, member.file_size, shape, by_columns, dtype)
    except (zipfile.BadZipFile, zlib.error, EOFError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{where} is damaged: {error}.") from error


def _array(
    where: str, stream: IO[bytes], size: int, shape: tuple[int, ...], by_columns: bool, dtype: np.dtype
) -> Array:
    bytes_wanted, bytes_there = dtype.itemsize, size - stream.tell()
    for n in shape:
        bytes_wanted *= n
    if min(shape, default=0) < 0 or bytes_wanted != bytes_there:
        raise ValueError(f"{where} has {bytes_there} bytes for {dtype} of shape {shape}, which takes {bytes_wanted}.")
    data = bytearray(stream.read(bytes_there + 1))  # one more: the end of a member is where its checksum is compared
    if len(data) != bytes_there:
        raise ValueError(f"{where} is cut short: {len(data)} of {bytes_there} bytes.")
    return np.ndarray(shape, dtype, data, order="F" if by_columns else "C")
