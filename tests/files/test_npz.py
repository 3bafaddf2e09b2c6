"""Tests .npz files: every member must be an array of numbers that fits into the file, or the error names it."""

import io
import pickle
import struct
import zipfile

import numpy as np
import pytest

from bnjax import tools


def npy(array, **options):
    """Returns the bytes of an array as a member of the file."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asarray(array), **options)
    return stream.getvalue()


def header(shape, descr="<f4", extra="", version=1):
    """Returns the header of a member with any shape and dtype, true or not."""
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}{extra}}}\n".encode("latin1")
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text


def write(file, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return file


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_writes(tmp_path, save):
    wanted = {
        "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big endian": np.arange(3, dtype=">f8"),
        "scalar": np.array(7),
        "none": np.ones((0, 3)),
        "true": np.array([True, False]),
        "complex": np.array([1j]),
        "half": np.ones(2, np.float16),
        "zeros": np.zeros((1000, 1000), np.float32),  # the most that deflate can do
    }
    save(tmp_path / "state.npz", **wanted)
    arrays = tools.read_arrays(tmp_path / "state.npz")
    assert arrays.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(arrays[name], value, err_msg=name)
        assert (arrays[name].dtype, arrays[name].flags.writeable) == (value.dtype, True)


FOUR = bytes(16)
BROKEN = {
    "pickled objects": [("w.npy", npy(np.array([{"a": 1}], object), allow_pickle=True))],
    "a pickle": [("w", pickle.dumps([1, 2]))],
    "a pickle called an array": [("w.npy", pickle.dumps([1, 2]))],
    "text": [("readme.txt", b"hello")],
    "a structure": [("w.npy", npy(np.zeros(2, [("a", "f4"), ("b", "i4")])))],
    "a huge shape": [("w.npy", header((2**40,)) + FOUR)],
    "a product over 2⁶⁴": [("w.npy", header((2**40, 2**40)) + FOUR)],
    "a negative size": [("w.npy", header((-4,)) + FOUR)],
    "two negative sizes": [("w.npy", header((-2, -2)) + FOUR)],
    "too few bytes": [("w.npy", header((5,)) + FOUR)],
    "too many bytes": [("w.npy", header((3,)) + FOUR)],
    "no header": [("w.npy", b"")],
    "half a header": [("w.npy", header((4,))[:20])],
    "a header that calls": [("w.npy", header("__import__('os').getpid()") + FOUR)],
    "a header without end": [("w.npy", header("(" * 5_000) + FOUR)],
    "a shape of text": [("w.npy", header("('4',)") + FOUR)],
    "another key": [("w.npy", header((4,), extra=", 'more': 1") + FOUR)],
    "an unknown dtype": [("w.npy", header((4,), "<q9") + FOUR)],
    "another version": [("w.npy", b"\x93NUMPY\x09\x00" + FOUR)],
    "twice": [("w.npy", npy(np.ones(1))), ("w.npy", npy(np.zeros(1)))],
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("case", BROKEN)
def test_broken_members(tmp_path, case):
    file = write(tmp_path / "state.npz", BROKEN[case])
    with pytest.raises(ValueError, match=rf"(?s)state\.npz.*{BROKEN[case][0][0]}"):
        tools.read_arrays(file)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compression_that_numpy_never_uses(tmp_path, compression):
    """Checks that other compressions are refused: their ratio is unbounded, so a small file could fill the memory."""
    with pytest.raises(ValueError, match=r"state\.npz: member 'w\.npy'"):
        tools.read_arrays(write(tmp_path / "state.npz", [("w.npy", npy(np.zeros(9)))], compression))


@pytest.mark.parametrize("raw", [b"", b"PK\3\4", pickle.dumps(np.ones(3)), npy(np.ones(3))])
def test_files_of_another_kind(tmp_path, raw):
    (tmp_path / "state.npz").write_bytes(raw)
    with pytest.raises(ValueError, match=r"state\.npz is damaged"):
        tools.read_arrays(tmp_path / "state.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_any_byte_changed(tmp_path, save):
    """Checks that after a change of any byte the arrays are right, or ValueError is raised."""
    file = tmp_path / "state.npz"
    save(file, w=np.arange(5.0))
    whole = file.read_bytes()
    for at in range(len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            arrays = tools.read_arrays(file)
        except ValueError as error:
            assert "state.npz" in str(error)  # noqa: PT017
        else:
            assert [array.shape for array in arrays.values()] == [(5,)]
            np.testing.assert_array_equal(*arrays.values(), np.arange(5.0))
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="state"):
            tools.read_arrays(file)
