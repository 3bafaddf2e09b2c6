"""Makes a small set of real photographs: parts of the three that scikit-learn and matplotlib bring, one class each."""

from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

PHOTOGRAPHS = {
    "building": ("sklearn.datasets.images", "china.jpg"),
    "flower": ("sklearn.datasets.images", "flower.jpg"),
    "person": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
}


@cache
def photograph(name: str) -> Image.Image:
    """Returns a photograph, of some 600 × 400 pixels."""
    package, path = PHOTOGRAPHS[name]
    return Image.open(files(package) / path).convert("RGB")


def write_folder(folder: Path, train: int, test: int, side: int = 64) -> Path:
    """Writes parts of the photographs as DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg.

    Args:
        folder: is made.
        train: images of each class in training, from the left two thirds of the photograph.
        test: images of each class in evaluation, from the right third.
        side: mean side of an image, in pixels; each has another size.
    """
    for part, count, (begin, end) in (("train", train, (0, 2 / 3)), ("val", test, (2 / 3, 1))):
        rng = np.random.default_rng(len(part))
        for name in PHOTOGRAPHS:
            image, inside = photograph(name), folder / part / name
            inside.mkdir(parents=True)
            for number in range(count):
                width, height = rng.integers(3 * side // 4, 5 * side // 4 + 1, size=2)
                left = rng.integers(int(begin * image.width), int(end * image.width) - width + 1)
                upper = rng.integers(image.height - height + 1)
                box = tuple(map(int, (left, upper, left + width, upper + height)))
                image.crop(box).save(inside / f"{number:04d}.jpg", quality=90)
    return folder
