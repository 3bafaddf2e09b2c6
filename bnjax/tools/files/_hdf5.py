"""The arrays of an HDF5 file: every dataset named and checked, nothing followed out of the file, no plugin loaded."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from bnjax.tools.convert._correspondence import Array
from bnjax.tools.files._naming import naming

_MOST_OF_DEFLATE = 1032  # no deflated byte stands for more
_FILTERS = {1, 2, 3}  # deflate, shuffle and a checksum: part of HDF5 itself, where others load code from elsewhere


def datasets_of(name: str, source: Path | IO[bytes], size: int) -> Iterator[tuple[str, Array, dict[str, str]]]:
    """Returns the arrays by path, with the names that groups above them were given: `{path of a group: its name}`.

    Args:
      name: of the file, for errors.
      source: the file, or its bytes.
      size: of the file in bytes, which bounds what it can hold.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f'{name} is read by h5py: pip install "bnjax[files]".') from error
    with naming(name), h5py.File(source, "r") as file:
        yield from _walk(h5py, name, file, size)


def _walk(h5py: Any, name: str, file: Any, size: int) -> Iterator[tuple[str, Array, dict[str, str]]]:
    """Yields every dataset, by a stack and not by recursion, as a file may nest groups as deep as it likes."""
    named: dict[str, str] = {}
    seen, stack = {_address(h5py, file)}, [("", file)]
    while stack:
        path, group = stack.pop()
        if isinstance(given := group.attrs.get("name"), str):
            named[path] = given
        for key in group:
            below = f"{path}/{key}".removeprefix("/")
            if not isinstance(group.get(key, getlink=True), h5py.HardLink):
                raise ValueError(f"{name}: {below} is a link to another place, which is not followed.")
            node = group[key]
            if isinstance(node, h5py.Dataset):
                with naming(f"{name}: {below}"):
                    array = _array(node, size)
                yield below, array, named
                continue
            if not isinstance(node, h5py.Group) or _address(h5py, node) in seen:
                raise ValueError(f"{name}: {below} is no dataset, and no group of its own.")
            seen.add(_address(h5py, node))
            stack.append((below, node))


def _address(h5py: Any, group: Any) -> int:
    return int(h5py.h5o.get_info(group.id).addr)


def _array(dataset: Any, size: int) -> Array:
    """Returns the values of a dataset, once they must be in the file itself."""
    dtype, is_bfloat16 = dataset.dtype, dataset.attrs.get("dtype") == "bfloat16"
    if dtype.kind not in "fiubc" and not (is_bfloat16 and dtype.itemsize == 2):
        raise ValueError(f"it holds {dtype}, no numbers")
    made = dataset.id.get_create_plist()
    filters = {made.get_filter(i)[0] for i in range(made.get_nfilters())}
    if dataset.is_virtual or dataset.external or not filters <= _FILTERS:
        raise ValueError("it is stored outside of the file, or by a filter that would have to be loaded")
    wanted, stored = math.prod(dataset.shape or ()) * dtype.itemsize, dataset.id.get_storage_size()
    if dataset.shape is None or stored > size or wanted > stored * (_MOST_OF_DEFLATE if filters else 1):
        raise ValueError(
            f"its shape {dataset.shape} takes {wanted} bytes; {stored} are stored for it in a file of {size}"
        )
    array: Array = dataset[()] if dataset.shape else np.asarray(dataset[()])
    return array.view(ml_dtypes.bfloat16).astype(np.float32) if is_bfloat16 else array
