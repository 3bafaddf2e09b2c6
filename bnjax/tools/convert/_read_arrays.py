"""Arrays from files that other libraries write, without those libraries."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_DTYPES = {
    "F64": "f8",
    "F32": "f4",
    "F16": "f2",
    "I64": "i8",
    "I32": "i4",
    "I16": "i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}


def read_arrays(file: str | Path) -> dict[str, Array]:
    r"""The arrays of a `.safetensors` or `.npz` file, without PyTorch.

    A safetensors file is :math:`\text{length (8 bytes)} \cdot \text{JSON header} \cdot \text{data}`.

    Args:
      file: its path.

    Returns:
      Arrays of any shapes by name; bfloat16 becomes float32, which holds it exactly.

    Raises:
      ValueError: a file of another kind, or cut short.

    Examples:
      >>> import numpy as np, tempfile
      >>> from bnjax import tools
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     np.savez(folder + "/state.npz", weight=np.ones(2))
      ...     tools.read_arrays(folder + "/state.npz")
      {'weight': array([1., 1.])}
    """
    file = Path(file)
    if file.suffix == ".npz":
        with np.load(file) as arrays:
            return dict(arrays)
    if file.suffix != ".safetensors":
        raise ValueError(f"read_arrays takes .safetensors and .npz; got {file.name}. Save a .pt file as one of these.")
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    if len(data) < 8 or end > len(data):
        raise ValueError(f"{file.name} is cut short: its header ends at byte {end}, the file at {len(data)}.")
    header = json.loads(data[8:end])
    return {name: _tensor(name, data[end:], entry) for name, entry in header.items() if name != "__metadata__"}


def _tensor(name: str, data: bytes, entry: Mapping[str, Any]) -> Array:
    start, stop = entry["data_offsets"]
    if stop > len(data):
        raise ValueError(f"the file is cut short: {name} ends at byte {stop} of its data, which has {len(data)}.")
    raw = data[start:stop]
    if entry["dtype"] == "BF16":  # the upper half of a float32
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4").reshape(entry["shape"])
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"{name} has dtype {entry['dtype']}; known are BF16 and {sorted(_DTYPES)}.")
    return np.frombuffer(raw, np.dtype(_DTYPES[entry["dtype"]]).newbyteorder("<")).reshape(entry["shape"])
