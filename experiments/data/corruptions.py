"""Common corruptions of grey images at five strengths, as in Hendrycks & Dietterich 2019, for images of 28×28.

What is random (noise, places, directions) depends on the seed, the image's place in the array and the kind of
corruption, not on the strength: the same noise grows, the same shift goes on.
"""

import zlib
from collections.abc import Callable

import numpy as np

Corruption = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]  # images in [0, 1]

STRENGTHS = (1, 2, 3, 4, 5)


def corrupt(images: np.ndarray, name: str, strength: int, seed: int = 0) -> np.ndarray:
    """The images after the corruption `name`.

    Args:
        images: `[N, H, W, 1]` uint8.
        name: one of `CORRUPTIONS`.
        strength: 1 to 5.
        seed: of whatever is random.

    Returns:
        `[N, H, W, 1]` uint8.
    """
    function, amounts = CORRUPTIONS[name]
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    changed = function(images[..., 0].astype(np.float32) / 255, amounts[strength - 1], rng)
    return np.rint(255 * np.clip(changed, 0, 1)).astype(np.uint8)[..., None]


def noise(x: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """Adds a Gaussian of this standard deviation to each pixel."""
    return x + amount * rng.standard_normal(x.shape, np.float32)


def salt_and_pepper(x: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """This share of the pixels turns white or black."""
    hit, white = rng.random(x.shape) < amount, rng.random(x.shape) < 0.5
    return np.where(hit, white, x)


def blur(x: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """A Gaussian filter of this standard deviation in pixels, over a black background."""
    return along_both(x, lambda size: gaussian(size, amount))


def pixelation(x: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """The mean of each cell of a grid of so many cells each way."""
    return along_both(x, lambda size: cells(size, int(amount)))


def contrast(x: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """This share of each pixel's distance from the mean of its image goes."""
    mean = x.mean((1, 2), keepdims=True)
    return mean + (1 - amount) * (x - mean)


def brightness(x: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """Adds so much to each pixel."""
    return x + amount


def darkness(x: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """Takes this share of the light away."""
    return (1 - amount) * x


def occlusion(x: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """A black square of so many pixels, about a point that is anywhere in the middle half of the image."""
    rows, columns = (rng.integers(size // 4, size - size // 4, (len(x), 1)) for size in x.shape[1:])
    inside = [
        np.abs(np.arange(n) - middle) <= amount / 2 for n, middle in zip(x.shape[1:], (rows, columns), strict=True)
    ]
    return np.where(inside[0][:, :, None] & inside[1][:, None, :], 0, x)


def shift(x: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """So many pixels to one of eight sides, over a black background."""
    step = np.array([(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j])[rng.integers(8, size=len(x))]
    places = np.stack(np.indices(x.shape[1:]))[None] - int(amount) * step[:, :, None, None]
    return sample(x, places.astype(np.float32))


def rotation(x: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """So many degrees about the middle, to one side or the other, over a black background."""
    angle = np.deg2rad(amount) * rng.choice([-1, 1], (len(x), 1, 1)).astype(np.float32)
    middle = (np.array(x.shape[1:], np.float32)[:, None, None] - 1) / 2
    down, right = np.indices(x.shape[1:]) - middle
    turned = np.stack([np.cos(angle) * down - np.sin(angle) * right, np.sin(angle) * down + np.cos(angle) * right], 1)
    return sample(x, turned + middle)


CORRUPTIONS: dict[str, tuple[Corruption, tuple[float, ...]]] = {
    "noise": (noise, (0.05, 0.1, 0.2, 0.3, 0.4)),
    "salt and pepper": (salt_and_pepper, (0.02, 0.05, 0.1, 0.2, 0.3)),
    "blur": (blur, (0.5, 0.75, 1.0, 1.5, 2.0)),
    "pixelation": (pixelation, (20, 14, 10, 7, 5)),
    "contrast": (contrast, (0.3, 0.5, 0.6, 0.7, 0.8)),
    "brightness": (brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "darkness": (darkness, (0.3, 0.5, 0.6, 0.7, 0.8)),
    "occlusion": (occlusion, (4, 6, 8, 10, 12)),
    "shift": (shift, (1, 2, 3, 4, 5)),
    "rotation": (rotation, (8, 16, 24, 32, 40)),
}


def along_both(x: np.ndarray, matrix: Callable[[int], np.ndarray]) -> np.ndarray:
    """Rows and columns of each image times a matrix of their size."""
    return np.einsum("ij,njk,lk->nil", matrix(x.shape[1]), x, matrix(x.shape[2]), optimize=True)


def gaussian(size: int, deviation: float) -> np.ndarray:
    """`[size, size]`: row i holds the weights of a Gaussian about i, which sum to one where nothing is cut off."""
    weights = np.exp(-((np.arange(size) - np.arange(size)[:, None]) ** 2) / (2 * deviation**2))
    return (weights / weights.sum(1).max()).astype(np.float32)


def cells(size: int, count: int) -> np.ndarray:
    """`[size, size]`: row i holds the weights of the mean over the cell that i is in."""
    cell = np.arange(size) * count // size
    same = (cell == cell[:, None]).astype(np.float32)
    return same / same.sum(1, keepdims=True)


def sample(x: np.ndarray, places: np.ndarray) -> np.ndarray:
    """x `[N, H, W]` at places `[N, 2, H, W]` between its pixels, bilinear; black outside."""
    x = np.pad(x, [(0, 0), (1, 1), (1, 1)])
    places = np.clip(places + 1, 0, np.array(x.shape[1:])[:, None, None] - 1)
    low = np.minimum(places.astype(int), np.array(x.shape[1:])[:, None, None] - 2)
    (down, right), (i, j), n = np.moveaxis(places - low, 1, 0), np.moveaxis(low, 1, 0), np.arange(len(x))[:, None, None]
    upper = (1 - right) * x[n, i, j] + right * x[n, i, j + 1]
    lower = (1 - right) * x[n, i + 1, j] + right * x[n, i + 1, j + 1]
    return (1 - down) * upper + down * lower
