"""The arrays of an .npz file: every member named, bounded and checked, none unpickled."""

import io
import math
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from bnjax.tools.convert._correspondence import Array
from bnjax.tools.files._naming import naming

_MOST_OF_DEFLATE = 1032  # no deflated byte stands for more, so that the size of a file bounds what comes out of it
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_npz(file: Path) -> dict[str, Array]:
    """Returns the arrays by name."""
    with naming(file.name), zipfile.ZipFile(file) as archive:
        return {name.removesuffix(".npy"): _member(file, archive, name) for name in names_of(file, archive)}


def names_of(file: Path, archive: zipfile.ZipFile) -> list[str]:
    """Returns the members; raises ValueError where two have one name."""
    names = [member.filename for member in archive.infolist()]
    if len(set(names)) < len(names):
        raise ValueError(f"{file.name} has two members {max(names, key=names.count)!r}.")
    return names


def bytes_of(file: Path, archive: zipfile.ZipFile, name: str) -> bytes:
    """Returns a member, once its sizes are possible; what it holds is as long as it says, and fits its checksum."""
    member, size = archive.getinfo(name), file.stat().st_size
    if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError("it is encrypted, or compressed in an uncommon way")
    if member.file_size > _MOST_OF_DEFLATE * member.compress_size or member.compress_size > size:
        raise ValueError(f"it claims {member.file_size} bytes out of {member.compress_size} in a file of {size}")
    with archive.open(member) as stream:
        data = stream.read()
    if len(data) != member.file_size:
        raise ValueError(f"it is cut short: {len(data)} of {member.file_size} bytes")
    return data


def _member(file: Path, archive: zipfile.ZipFile, name: str) -> Array:
    with naming(f"{file.name}: member {name!r}"):
        if not name.endswith(".npy"):
            raise ValueError("it is no .npy array")
        return _array(bytes_of(file, archive, name))


def _array(data: bytes) -> Array:
    stream: IO[Any] = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise ValueError(f"it has version {version} of the format, which plain arrays do not need")
    shape, by_columns, dtype = _HEADERS[version](stream)
    if dtype.hasobject or dtype.names:
        raise ValueError(f"it holds {dtype}, no numbers: only pickles would bring such back")
    wanted, there = dtype.itemsize * math.prod(shape), len(data) - stream.tell()
    if min(shape, default=0) < 0 or wanted != there:
        raise ValueError(f"it has {there} bytes for {dtype} of shape {shape}, which takes {wanted}")
    return np.ndarray(shape, dtype, bytearray(data)[stream.tell() :], order="F" if by_columns else "C")
