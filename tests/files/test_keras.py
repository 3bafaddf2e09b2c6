"""Tests reading Keras' files in three layouts, and HDF5 files with false content, without running code from them."""

import importlib.util
import io
import json
import os
import zipfile

import h5py
import ml_dtypes
import numpy as np
import pytest

from bnjax import tools

ARRAYS = {
    "stem/kernel": np.arange(36, dtype="f4").reshape(3, 3, 1, 4),
    "stem/bias": np.arange(4, dtype="f4"),
    **{f"bn/{word}": np.arange(4, dtype="f4") + i for i, word in enumerate(("beta", "moving_mean", "moving_variance"))},
    "block/sep/depthwise_kernel": np.ones((3, 3, 4, 2), "f4"),
    "block/sep/pointwise_kernel": np.ones((1, 1, 8, 6), "f4"),
    "block/sep/bias": np.ones(6, "f4"),
}
# Keras 3: by class, numbered within a layer, the layers' own names beside
GROUPS = {"stem": "layers/conv2d", "bn": "layers/batch_normalization_10", "block": "layers/sequential"}
GROUPS["block/sep"] = "layers/sequential/layers/separable_conv2d"
LAYERS = [
    ("Conv2D", {"name": "stem", "use_bias": True}),
    ("BatchNormalization", {"name": "bn", "scale": False, "center": True}),
    ("SeparableConv2D", {"name": "sep"}),
]


def numbered(file, arrays=ARRAYS):
    """Writes the layout of `.weights.h5` in Keras 3, with the state of an optimizer and of a dropout layer."""
    for name, group in GROUPS.items():
        held = file.create_group(f"{group}/vars")
        held.attrs["name"] = name.rpartition("/")[2]
        values = [value for key, value in arrays.items() if key.rpartition("/")[0] == name]
        for i, value in enumerate(values):
            held[str(i)] = value
    file["optimizer/vars/0"] = np.ones(3)
    file["layers/dropout/seed_generator/vars/0"] = np.zeros(2, "u4")


def older(file):
    """Writes the layout of `.h5` in Keras 2: a group per layer, which holds weights with names that end in ":0"."""
    for name, value in ARRAYS.items():
        file[f"model_weights/{name.partition('/')[0]}/{name}:0"] = value
    file["optimizer_weights/adam/stem/kernel/m:0"] = np.ones(3)


def keras(path, layers=LAYERS, numbers=numbered, member="model.weights.h5"):
    weights = io.BytesIO()
    with h5py.File(weights, "w") as file:
        numbers(file)
    described = [
        {"class_name": name, "config": config, "module": "os", "registered_name": "system"} for name, config in layers
    ]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", json.dumps({"class_name": "Functional", "config": {"layers": described}}))
        archive.writestr(member, weights.getvalue())
    return path


def equal(arrays, wanted):
    assert arrays.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(arrays[name], value, err_msg=name)


def test_keras_3(tmp_path):
    """Checks that layers keep their names, and weights get theirs from the model's description."""
    equal(tools.read_arrays(keras(tmp_path / "m.keras")), ARRAYS)


def test_weights_of_keras_3(tmp_path):
    with h5py.File(tmp_path / "m.weights.h5", "w") as file:
        numbered(file)
    arrays = tools.read_arrays(tmp_path / "m.weights.h5")
    assert {"stem/vars/0", "stem/vars/1", "bn/vars/2", "block/sep/vars/2"} <= arrays.keys()
    assert len(arrays) == len(ARRAYS)
    # layers that nothing describes
    equal(tools.read_arrays(keras(tmp_path / "m.keras", layers=[])), arrays)


def test_keras_2(tmp_path):
    with h5py.File(tmp_path / "m.h5", "w") as file:
        older(file)
    equal(tools.read_arrays(tmp_path / "m.h5"), ARRAYS)


def test_dtypes_and_storage(tmp_path):
    """Checks arrays that are compressed, chunked, empty or scalar, and bfloat16 as Keras stores it."""
    wanted = {
        "zipped/w": np.zeros((300, 300), "f4"),
        "half/w": np.ones(3, "f2"),
        "scalar/w": np.array(7),
        "none/w": np.ones((0, 3)),
    }
    with h5py.File(tmp_path / "m.h5", "w") as file:
        for name, value in wanted.items():
            file[name] = value
        del file["zipped/w"]
        file.create_dataset("zipped/w", data=wanted["zipped/w"], chunks=(64, 64), compression="gzip", shuffle=True)
        held = np.array([1.5, -2.0, 1e30], ml_dtypes.bfloat16)
        file.create_dataset("b/w", data=held).attrs["dtype"] = "bfloat16"
    equal(tools.read_arrays(tmp_path / "m.h5"), {**wanted, "b/w": held.astype(np.float32)})


def a_loop(file):
    file.create_group("a/b")
    file["a/b/c"] = file["a"]


def elsewhere(file):
    file.create_dataset("a/w", (4,), "f4", external=[("/etc/hostname", 0, 16)])


def virtual(file):
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "w", (4,))
    file.create_virtual_dataset("a/w", layout)


def unwritten(file):
    file.create_dataset("a/w", (2**40,), "f4", chunks=(2**10,), compression="gzip")


def filtered(file):
    file.create_dataset("a/w", data=np.ones(100), chunks=(10,), compression="lzf")


def assign(name, value):
    return lambda file: file.__setitem__(name, value)


BROKEN = {
    "a link to a file": (assign("a/w", h5py.ExternalLink("/etc/hostname", "w")), "a/w is a link"),
    "a link within": (assign("a/w", h5py.SoftLink("/b")), "a/w is a link"),
    "a loop": (a_loop, "a/b/c is no dataset"),
    "bytes of another file": (elsewhere, "a/w.*outside of the file"),
    "a dataset of another file": (virtual, "a/w.*outside of the file"),
    "a filter that has to be loaded": (filtered, "a/w.*filter"),
    "more than is stored": (unwritten, r"a/w.*takes 4398046511104 bytes; 0 are stored"),
    "text": (assign("a/w", "hello"), "a/w.*no numbers"),
    "a structure": (assign("a/w", np.zeros(2, [("a", "f4")])), "a/w.*no numbers"),
    "nothing": (assign("a/w", h5py.Empty("f4")), "a/w.*None"),
    "a type": (assign("a/w", np.dtype("f4")), "a/w is no dataset"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("kind", [".h5", ".keras"])
def test_what_misleads(tmp_path, case, kind):
    make, message = BROKEN[case]
    path = tmp_path / f"m{kind}"
    if kind == ".keras":
        keras(path, numbers=make)
    else:
        with h5py.File(path, "w") as file:
            make(file)
    with pytest.raises(ValueError, match=rf"(?s)m{kind}.*{message}"):
        tools.read_arrays(path)


def test_groups_without_end(tmp_path):
    """Checks that groups nested deeper than Python's stack are read."""
    with h5py.File(tmp_path / "m.h5", "w") as file:
        group = file
        for _ in range(3000):
            group = group.create_group("g")
        group["w"] = np.ones(2)
    (value,) = tools.read_arrays(tmp_path / "m.h5").values()
    np.testing.assert_array_equal(value, 1)


@pytest.mark.parametrize("described", ["[" * 100_000, '{"config":' * 50_000, "{", "\\xff"])
def test_descriptions_that_mislead(tmp_path, described):
    with zipfile.ZipFile(tmp_path / "m.keras", "w") as archive:
        archive.writestr("config.json", described)
        archive.writestr("model.weights.h5", b"")
    with pytest.raises(ValueError, match=r"m\.keras"):
        tools.read_arrays(tmp_path / "m.keras")


def test_files_of_another_kind(tmp_path):
    keras(tmp_path / "m.keras", member="weights.bin")
    with pytest.raises(ValueError, match=r"model\.weights\.h5"):
        tools.read_arrays(tmp_path / "m.keras")
    (tmp_path / "m.h5").write_bytes(b"not at all")
    with pytest.raises(ValueError, match=r"m\.h5 is damaged"):
        tools.read_arrays(tmp_path / "m.h5")
    with pytest.raises(FileNotFoundError):
        tools.read_arrays(tmp_path / "missing.h5")


def test_two_layers_of_one_name(tmp_path):
    def twice(file):
        for group in ("dense", "dense_1"):
            held = file.create_group(f"layers/{group}/vars")
            held.attrs["name"], held["0"] = "same", np.ones((2, 2))

    with pytest.raises(ValueError, match="two weights 'same/"):
        tools.read_arrays(keras(tmp_path / "m.keras", numbers=twice))


if importlib.util.find_spec("keras"):

    @pytest.mark.filterwarnings("ignore:__array__ implementation")  # of Keras' own variables
    def test_what_keras_writes(tmp_path):
        """Checks every layout as Keras writes it, with optimizer, dropout, a nested model, and options of BN."""
        os.environ["KERAS_BACKEND"] = "jax"
        import jax
        import keras
        from keras import layers

        with jax.numpy_rank_promotion("allow"):
            inner = [layers.Conv2D(4, 3, name="conv"), layers.BatchNormalization(scale=False, name="plain")]
            model = keras.Sequential(
                [
                    layers.Input((8, 8, 3)),
                    layers.SeparableConv2D(4, 3, depth_multiplier=2, name="separable"),
                    layers.BatchNormalization(renorm=True, name="renorm"),
                    keras.Sequential([layers.Input((6, 6, 4)), *inner], name="block"),
                    layers.Dropout(0.5),
                    layers.Flatten(),
                    layers.Dense(2, name="head"),
                ],
                name="net",
            )
            model.compile("adam", "mse")
            model.fit(np.ones((2, 8, 8, 3)), np.ones((2, 2)), verbose=0)
            wanted = {w.path.removeprefix("net/"): np.asarray(w.value) for w in model.weights}
            for name in ("m.keras", "m.h5", "m.weights.h5"):
                (model.save_weights if "weights" in name else model.save)(tmp_path / name)
                arrays = tools.read_arrays(tmp_path / name)
                if "weights" in name:  # numbered in the order of the layer's weights
                    arrays = {k: arrays[f"{k.rpartition('/')[0]}/vars/{i}"] for k, i in counted(wanted)}
                if name == "m.h5":
                    arrays = {k.removeprefix("net/"): v for k, v in arrays.items()}
                equal(arrays, wanted)


def counted(names):
    """Yields each name with its index among the names of its layer."""
    seen = {}
    for name in names:
        layer = name.rpartition("/")[0]
        seen[layer] = seen.get(layer, -1) + 1
        yield name, seen[layer]
