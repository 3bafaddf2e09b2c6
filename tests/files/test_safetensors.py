"""Tests safetensors files: what is read, how many bytes that takes, and the errors for broken files."""

import json
import pickle

import ml_dtypes
import numpy as np
import pytest

from bnjax import tools


def write(file, header, data=b""):
    """Writes a file by the definition of the format; a header given as bytes is written unchanged."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


def entry(start, stop, shape=None, dtype="F32"):
    return {"dtype": dtype, "shape": [(stop - start) // 4] if shape is None else shape, "data_offsets": [start, stop]}


WORDS = {
    "F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1",
    "U64": "u8", "U32": "u4", "U16": "u2", "U8": "u1", "BOOL": "?", "C64": "c8",
    "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
}  # fmt: skip


def test_every_dtype(tmp_path):
    """Checks all dtypes in one file, with odd sizes, so that arrays are not aligned to their elements."""
    header, data, wanted = {"__metadata__": {"format": "pt"}}, b"", {}
    for word, dtype in WORDS.items():
        for name, shape in {f"{word}.a": (3, 1), f"{word}.scalar": (), f"{word}.none": (0, 2)}.items():
            wanted[name] = np.arange(1, 1 + np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
            raw = wanted[name].tobytes()
            header[name] = entry(len(data), len(data) + len(raw), list(shape), word)
            data += raw
    arrays = tools.read_arrays(write(tmp_path / "all.safetensors", header, data))
    assert arrays.keys() == wanted.keys()
    for name, value in wanted.items():
        kept = np.float32 if value.dtype.kind == "V" else value.dtype
        np.testing.assert_array_equal(arrays[name], value.astype(kept), err_msg=name)
        assert arrays[name].dtype == kept
        assert arrays[name].flags.writeable


def test_arrays_are_views_of_one_block(tmp_path):
    """Checks that the file is read once, however many arrays it holds."""
    header = {f"layer{i}": entry(4000 * i, 4000 * (i + 1)) for i in range(400)}
    arrays = tools.read_arrays(write(tmp_path / "many.safetensors", header, bytes(1_600_000)))

    def block(array):
        return array if array.base is None else block(array.base)

    assert len({id(block(array)) for array in arrays.values()}) == 1


A = entry(0, 8)
BROKEN = {
    "negative offset": ({"w": entry(-4, 0, [1])}, 4, "'w'"),
    "negative size": ({"w": entry(0, 4, [-1])}, 4, "'w'"),
    "reversed offsets": ({"w": entry(4, 0, [1])}, 4, "`w`"),
    "overlapping": ({"a": A, "b": entry(4, 12)}, 12, "`b`"),
    "the same bytes twice": ({"a": A, "b": A}, 8, "`[ab]`"),
    "a hole": ({"a": A, "b": entry(12, 20)}, 20, "`b`"),
    "beyond the end": ({"a": entry(0, 16)}, 8, "'a'"),
    "bytes that are nobody's": ({"a": A}, 12, "not fully covered"),
    "another size than the shape": ({"a": entry(0, 8, [3])}, 8, "'a'"),
    "a product over 2⁶⁴": ({"a": entry(0, 8, [2**40, 2**40])}, 8, "'a'"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, 8, "'a'"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, 8, "'a'"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, 8, "'a'"),
    "offsets that are no numbers": ({"a": entry(0, 8) | {"data_offsets": ["0", "8"]}}, 8, "'a'"),
    "a shape that is no list": ({"a": entry(0, 8, {"n": 2})}, 8, "'a'"),
    "an unknown dtype": ({"a": entry(0, 8, [2], "F9")}, 8, "'a'"),
    "a number for an entry": ({"a": 3}, 0, "'a'"),
    "a list for a header": ([1, 2], 0, "header"),
    "no JSON": (b"{not json}", 0, "header"),
    "no UTF-8": (b"\xff\xfe{}", 0, "header"),
    "an empty header": (b"", 0, "header"),
    "lists without end": (b"[" * 100_000, 0, "header"),
    "entries without end": (b'{"a":' * 5_000 + b"1" + b"}" * 5_000, 0, "header"),
    "two of one name": (b'{"a":%s,"a":%s}' % ((json.dumps(A).encode(),) * 2), 8, "two entries 'a'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_headers(tmp_path, case):
    header, size, named = BROKEN[case]
    file = write(tmp_path / "state.safetensors", header, bytes(size))
    with pytest.raises(ValueError, match=rf"(?s)state\.safetensors.*{named}"):
        tools.read_arrays(file)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0" * 7,
        b"\0" * 8,
        pickle.dumps({"w": [1]}),
        pickle.dumps(np.ones(9)),
        b"\xff" * 8 + b"{}",
        b"PK\3\4" + bytes(99),
    ],
    ids=["empty", "7 bytes", "8 bytes", "pickle", "pickled array", "a header of 2⁶⁴", "zip"],
)
def test_files_of_another_kind(tmp_path, raw):
    (tmp_path / "state.safetensors").write_bytes(raw)
    with pytest.raises(ValueError, match=r"state\.safetensors is no sound safetensors file"):
        tools.read_arrays(tmp_path / "state.safetensors")


def test_a_file_cut_anywhere(tmp_path):
    file = write(tmp_path / "state.safetensors", {"a": A, "b": entry(8, 12)}, bytes(12))
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="state"):
            tools.read_arrays(file)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        tools.read_arrays(tmp_path / "state.safetensors")


@pytest.mark.parametrize(("name", "message"), [("state.pt", "may run code"), ("state.xyz", "takes .safetensors, .npz")])
def test_other_files(name, message):
    with pytest.raises(ValueError, match=message):
        tools.read_arrays(name)
