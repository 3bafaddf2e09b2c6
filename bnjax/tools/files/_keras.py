"""The weights in Keras' files, `.keras` and `.h5` of several versions, by the names of layers and weights."""

import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bnjax.tools.convert._correspondence import Array
from bnjax.tools.convert._options import natural
from bnjax.tools.files._hdf5 import datasets_of
from bnjax.tools.files._naming import naming
from bnjax.tools.files._npz import bytes_of, names_of

Layers = Mapping[str, tuple[str, Mapping[str, Any]]]  # name -> class and configuration

_NOT_WEIGHTS = re.compile(r"(^|/)(optimizer|optimizer_weights|seed_generator)(/|$)")
_RENORM = ("moving_stddev", "renorm_mean", "renorm_stddev")


def read_h5(file: Path) -> dict[str, Array]:
    """Returns the arrays of an HDF5 file by path; those of Keras' files by the names of layers and weights."""
    return _named(file.name, list(datasets_of(file.name, file, file.stat().st_size)), {})


def read_keras(file: Path) -> dict[str, Array]:
    """Returns the weights in a `.keras` file by the names of layers and weights; its description is data alone."""
    where = f"{file.name}: model.weights.h5"
    with naming(file.name), zipfile.ZipFile(file) as archive:
        names = names_of(file, archive)
        with naming(where):
            weights = bytes_of(file, archive, "model.weights.h5")
        layers: Layers = {}
        if "config.json" in names:
            layers = dict(_layers(json.loads(bytes_of(file, archive, "config.json"))))
    return _named(where, list(datasets_of(where, io.BytesIO(weights), len(weights))), layers)


def _named(
    file: str,
    found: Sequence[tuple[str, Array, Mapping[str, str]]],
    layers: Mapping[str, tuple[str, Mapping[str, Any]]],
) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    for path, array, groups in sorted(found, key=lambda item: natural(item[0])):
        if not _NOT_WEIGHTS.search(path):
            name = _name(path, groups, layers)
            if name in arrays:
                raise ValueError(f"{file} has two weights {name!r}: give the layers of the model names of their own.")
            arrays[name] = array
    return arrays


def _name(path: str, groups: Mapping[str, str], layers: Layers) -> str:
    """Returns the layer and the weight that a dataset holds."""
    if match := re.fullmatch(r"(?:(.*)/)?vars/(\d+)", path):  # Keras 3 numbers them
        within, number = match[1] or "", int(match[2])
        parts = within.split("/")
        above = ["/".join(parts[:at]) for at in range(1, len(parts) + 1)]
        named = [groups[f"{group}/vars"] for group in above if f"{group}/vars" in groups]
        layer = "/".join(named) if f"{within}/vars" in groups else within
        words = _words(*layers[named[-1]]) if named and named[-1] in layers else ()
        return f"{layer}/{words[number]}" if number < len(words) else f"{layer}/vars/{number}"
    path = path.removeprefix("model_weights/")
    layer, _, rest = path.partition("/")
    return rest.removesuffix(":0") if "/" in rest else path.removesuffix(":0")  # older: layer/name of the weight


def _layers(described: Any) -> Iterator[tuple[str, tuple[str, Mapping[str, Any]]]]:
    """Returns the class and the configuration of each layer in the description of a model, by its name."""
    stack = [described]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            config = node.get("config")
            if isinstance(config, dict) and isinstance(config.get("name"), str):
                yield config["name"], (str(node.get("class_name")), config)
            stack += node.values()
        elif isinstance(node, list):
            stack += node


def _words(kind: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the weights of a layer in the order in which Keras numbers them; () for an unknown class."""
    affine = tuple(word for flag, word in (("scale", "gamma"), ("center", "beta")) if config.get(flag, True))
    if kind == "BatchNormalization":
        return (*affine, "moving_mean", "moving_variance", *(_RENORM if config.get("renorm") else ()))
    if kind in ("LayerNormalization", "GroupNormalization"):
        return affine
    if kind.startswith("SeparableConv"):
        return ("depthwise_kernel", "pointwise_kernel", "bias")
    if kind == "Embedding":
        return ("embeddings",)
    return ("kernel", "bias") if kind == "Dense" or "Conv" in kind else ()
