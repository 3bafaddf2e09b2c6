"""Decodes an image file and cuts a square from it: at random in training, from its centre in evaluation."""

import io
import math

import numpy as np
from PIL import Image, UnidentifiedImageError

AREA, RATIO, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10  # of the random crop: Szegedy et al. 2015, arXiv:1409.4842
CENTRE = 0.875  # side of the centre crop, of the shorter side of the image: 224 of 256
Box = tuple[int, int, int, int]  # left, upper, right, lower


def decode(content: bytes) -> Image.Image:
    """Returns the decoded RGB image.

    Raises:
        ValueError: the file is damaged or no image.
    """
    try:
        return Image.open(io.BytesIO(content)).convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError("no image file" if content else "an empty file, or one that cannot be read") from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and its own
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def random_crop(image: Image.Image, size: int, rng: np.random.Generator) -> np.ndarray:
    """Returns a random part of the image, mirrored every second time, as `[size, size, 3]` uint8."""
    pixels = resized(image, random_box(*image.size, rng), size)
    return pixels[:, ::-1] if rng.integers(2) else pixels


def centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """Returns the centre of the image as `[size, size, 3]` uint8."""
    return resized(image, centre_box(*image.size, CENTRE), size)


def random_box(width: int, height: int, rng: np.random.Generator) -> Box:
    """Draws a rectangle of 8 to 100 % of the area and a ratio of 3:4 to 4:3; the centre if none fits in ten draws."""
    for _ in range(TRIES):
        area = width * height * rng.uniform(*AREA)
        ratio = math.exp(rng.uniform(*map(math.log, RATIO)))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left, upper = int(rng.integers(width - wide + 1)), int(rng.integers(height - high + 1))
            return left, upper, left + wide, upper + high
    return centre_box(width, height, 1.0)


def centre_box(width: int, height: int, fraction: float) -> Box:
    """Returns the square around the centre whose side is this fraction of the shorter side."""
    side = max(1, round(fraction * min(width, height)))
    left, upper = (width - side) // 2, (height - side) // 2
    return left, upper, left + side, upper + side


def resized(image: Image.Image, box: Box, size: int) -> np.ndarray:
    """Returns the part of the image in the box, resized with an antialiased linear filter."""
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))
