"""What the article's PyTorch program does as printed: fails, or puts images together that do not belong together.

The text of PyTorch is in article_failures.json, computed again where PyTorch is installed. Everywhere its numbers are
worked out once more from the layers of the port.
"""

import importlib.util
import json
import re
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import linen as nn

from experiments.article import torch_port

FIXTURES = Path(__file__).parents[1] / "fixtures"
ROWS = json.loads((FIXTURES / "article_failures.json").read_text())
PRINTED = 32 * 28 * 28  # in `view` and in `Linear`


def left(program, count):
    """The shape, with PyTorch's order of axes, that the convolution and, where there is one, the maximum leave."""
    padding = "SAME" if "Padded" in program else "VALID"
    conv, images = nn.Conv(32, (3, 3), padding=padding), jax.ShapeDtypeStruct((count, 28, 28, 1), np.float32)
    shape = jax.eval_shape(lambda x: conv.init_with_output(jax.random.key(0), x)[0], images).shape
    channels_first = (shape[0], shape[3], shape[1], shape[2])
    return channels_first if "WithoutMaximum" in program else (count, *shape[1:3])


def rows(**wanted):
    return [row for row in ROWS if all(row[name] == value for name, value in wanted.items())]


WITH_CHANNEL = [row for row in ROWS if len(row["images"]) == 4]


@pytest.mark.parametrize("row", WITH_CHANNEL, ids=lambda row: f"{row['program']}-{row['images'][0]}")
def test_each_failure_is_that_of_the_shapes(row):
    """`view` refuses what it cannot divide; what it divides wrongly the loss refuses, since the labels are too many."""
    program, count = row["program"], row["images"][0]
    elements = int(np.prod(left(program, count)))
    view = elements // count if program in ("OnlyView", "Repaired") else PRINTED
    linear = elements // count if program in ("OnlyLinear", "Repaired") else PRINTED
    if elements % view:
        assert row["error"] == f"RuntimeError: shape '[-1, {view}]' is invalid for input of size {elements}"
        assert row["viewed"] is None
        return
    assert row["viewed"] == [elements // view, view]
    if view != linear:
        shapes = f"({count}x{view} and {linear}x10)"
        assert row["error"] == f"RuntimeError: mat1 and mat2 shapes cannot be multiplied {shapes}"
    elif elements // view != count:
        sizes = f"Expected input batch_size ({elements // view}) to match target batch_size ({count})."
        assert row["error"] == f"ValueError: {sizes}"
    else:
        assert row["error"] is None


@pytest.mark.parametrize("program", ["Net", "Padded", "WithoutMaximum"])
def test_the_smallest_batch_that_view_mixes(program):
    """The first number of images that `view` divides is among the rows, and each row of it holds several images."""
    per_image = int(np.prod(left(program, 1)))
    count = PRINTED // np.gcd(PRINTED, per_image)
    (row,) = rows(program=program, images=[count, 1, 28, 28])
    numbers = np.broadcast_to(np.arange(count)[:, None], (count, per_image)).reshape(
        -1, PRINTED
    )  # each image its number
    assert list(numbers.shape) == row["viewed"]
    mixed = [[int(images.min()), int(images.max())] for images in numbers]
    assert all(first < last for first, last in mixed)
    recorded = row["images of the rows"]
    assert recorded[0] == mixed[0] and recorded[-1] == mixed[-1]


def test_a_half_repaired_program_mixes_all_of_mnist():
    """With padding and still the maximum, the 60,000 images make 1,875 rows of 32 images, and only the loss notices."""
    (row,) = rows(program="Padded", images=[60_000, 1, 28, 28])
    assert row["viewed"][0] == 60_000 * 28 * 28 // PRINTED == 60_000 // 32
    assert "batch_size (1875)" in row["error"]


def test_images_without_a_channel_axis():
    (row,) = rows(images=[100, 28, 28])
    assert re.search(r"expected input\[1, 100, 28, 28\] to have 1 channels, but got 100 channels", row["error"])


def test_two_repairs_of_two_places_run():
    """Of all the programs only those run that change both places: the number twice, or padding and the maximum."""
    assert {row["program"] for row in ROWS if row["error"] is None} == {"Repaired", "PaddedWithoutMaximum"}
    shapes = jax.eval_shape(lambda: torch_port.MODEL.init(jax.random.key(0), np.zeros((1, 28, 28, 1)), train=False))
    (row,) = rows(program="Repaired")
    assert shapes["params"]["fc"]["kernel"].shape == (row["viewed"][1], 10) == (26 * 26, 10)


def test_the_converter_refuses_the_printed_number():
    """Weights of a `Linear(32 · 28 · 28, 10)` do not fit the layers, and the message has both numbers."""
    state = torch_port.save(torch_port.MODEL.init(jax.random.key(0), np.zeros((1, 28, 28, 1)), train=False))
    with pytest.raises(ValueError, match=r"fc.weight.*25088"):
        torch_port.load({**state, "fc.weight": np.zeros((10, PRINTED), np.float32)})


if importlib.util.find_spec("torch"):

    def test_pytorch_still_says_so():
        """The text in the file is what the installed PyTorch says."""
        assert runpy.run_path(str(FIXTURES / "make_article_failures.py"))["reference"]() == ROWS
