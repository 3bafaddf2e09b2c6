"""The arrays of a safetensors file: checked by the safetensors library, and read as views of one block."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from bnjax.tools.convert._correspondence import Array

_DTYPES: Mapping[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "C64": np.complex64,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def read_safetensors(file: Path) -> dict[str, Array]:
    """Returns the arrays by name; the library refuses a header that does not describe the file byte for byte."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(f'{file.name} is read by safetensors: pip install "bnjax[files]".') from error
    try:
        with safe_open(file, framework="numpy"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{file.name} is no sound safetensors file: {error}{_suspect(file)}.") from error
    raw = np.fromfile(file, np.uint8)
    data = raw[8 + int(raw[:8].view("<u8")[0]) :]
    header = json.loads(raw[8 : len(raw) - len(data)].tobytes(), object_pairs_hook=_distinct(file))
    return {name: _view(file, name, data, entry) for name, entry in header.items() if name != "__metadata__"}


def _view(file: Path, name: str, data: Array, entry: Mapping[str, Any]) -> Array:
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"{file.name}: {name} has dtype {entry['dtype']}; known are {', '.join(_DTYPES)}.")
    start, stop = entry["data_offsets"]
    dtype = np.dtype(_DTYPES[entry["dtype"]])
    array = data[start:stop].view(dtype).reshape(entry["shape"])
    return array.astype(np.float32) if dtype.kind == "V" else array


def _distinct(file: Path) -> Any:
    """Makes dictionaries of a header, whose names must differ: the library takes the last of two."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(items)) < len(items):
            twice = next(name for i, (name, _) in enumerate(items) if name in dict(items[:i]))
            raise ValueError(f"{file.name} has two entries {twice!r}.")
        return dict(items)

    return pairs


def _suspect(file: Path) -> str:
    """Returns what a refused header says of its first member that cannot be right, for the error alone."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        text = opened.read(min(size, 10_000_000))
        rest = file.stat().st_size - 8 - size
    try:
        header = json.loads(text)
        entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, AttributeError, RecursionError):  # no JSON, or JSON of something else
        return ""
    end = 0
    for name, entry in sorted(entries, key=lambda item: _offsets(item[1])):
        start, stop = _offsets(entry)
        if not (start == end and start <= stop <= rest and _bytes_of(entry) == stop - start):
            return f" (see {name!r}: {str(entry)[:200]}; {max(rest, 0)} bytes of data follow the header)"
        end = stop
    return ""


def _offsets(entry: Any) -> tuple[int, int]:
    """Returns where a member begins and ends; impossible places where that is not said."""
    given = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(given, list) or len(given) != 2 or not all(type(n) is int for n in given):
        return -1, -1
    return given[0], given[1]


def _bytes_of(entry: Mapping[str, Any]) -> int:
    """Returns the size of a member by its shape and dtype; −1 where these are not said."""
    dtype, shape = str(entry.get("dtype")), entry.get("shape")
    if dtype not in _DTYPES or not isinstance(shape, list) or not all(type(n) is int for n in shape):
        return -1
    size = np.dtype(_DTYPES[dtype]).itemsize
    for n in shape:
        size *= n
    return size
