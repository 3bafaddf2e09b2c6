"""Corrupts grey images of 28×28 in ten common ways at five strengths, after Hendrycks & Dietterich 2019.

Noise, positions and directions are drawn from the seed, the image's index and the kind of corruption, and do not depend
on the strength: a higher strength scales the same noise, and shifts or rotates the same image further the same way.
"""

import zlib
from collections.abc import Callable

import numpy as np

Corruption = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]  # images in [0, 1]

STRENGTHS = (1, 2, 3, 4, 5)


def corrupt(images: np.ndarray, name: str, strength: int, seed: int = 0) -> np.ndarray:
    """Applies the corruption `name` at one strength to every image.

    Args:
        images: `[N, H, W, 1]` uint8.
        name: one of `CORRUPTIONS`.
        strength: 1 to 5.
        seed: seed of the noise, positions and directions.

    Returns:
        `[N, H, W, 1]` uint8.
    """
    function, amounts = CORRUPTIONS[name]
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    changed = function(images[..., 0].astype(np.float32) / 255, amounts[strength - 1], rng)
    return np.rint(255 * np.clip(changed, 0, 1)).astype(np.uint8)[..., None]


def noise(x: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """Adds Gaussian noise of standard deviation `amount` to each pixel."""
    return x + amount * rng.standard_normal(x.shape, np.float32)


def salt_and_pepper(x: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """Sets the fraction `amount` of the pixels to white or black, with equal probability."""
    hit, white = rng.random(x.shape) < amount, rng.random(x.shape) < 0.5
    return np.where(hit, white, x)


def blur(x: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """Blurs with a Gaussian filter whose standard deviation is `amount` pixels; outside of the image is black."""
    return along_both(x, lambda size: gaussian(size, amount))


def pixelation(x: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """Replaces each pixel by the mean of its cell in a grid of `amount` × `amount` cells."""
    return along_both(x, lambda size: cells(size, int(amount)))


def contrast(x: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """Moves each pixel by the fraction `amount` of the way towards the mean of its image."""
    mean = x.mean((1, 2), keepdims=True)
    return mean + (1 - amount) * (x - mean)


def brightness(x: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """Adds `amount` to each pixel."""
    return x + amount


def darkness(x: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """Multiplies each pixel by 1 − `amount`."""
    return (1 - amount) * x


def occlusion(x: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """Draws a black square, `amount` pixels wide, centred at a random point in the middle half of each image."""
    rows, columns = (rng.integers(size // 4, size - size // 4, (len(x), 1)) for size in x.shape[1:])
    inside = [
        np.abs(np.arange(n) - middle) <= amount / 2 for n, middle in zip(x.shape[1:], (rows, columns), strict=True)
    ]
    return np.where(inside[0][:, :, None] & inside[1][:, None, :], 0, x)


def shift(x: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """Shifts each image by `amount` pixels in one of eight random directions and fills with black."""
    step = np.array([(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j])[rng.integers(8, size=len(x))]
    places = np.stack(np.indices(x.shape[1:]))[None] - int(amount) * step[:, :, None, None]
    return sample(x, places.astype(np.float32))


def rotation(x: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """Rotates each image by `amount` degrees about its centre, clockwise or not at random, and fills with black."""
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
    """Multiplies the rows and the columns of each image by the matrix that `matrix(size)` returns for their length."""
    return np.einsum("ij,njk,lk->nil", matrix(x.shape[1]), x, matrix(x.shape[2]), optimize=True)


def gaussian(size: int, deviation: float) -> np.ndarray:
    """Returns a blur matrix `[size, size]`: row i holds Gaussian weights centred at i, scaled to sum to one away from
    the edges.
    """
    weights = np.exp(-((np.arange(size) - np.arange(size)[:, None]) ** 2) / (2 * deviation**2))
    return (weights / weights.sum(1).max()).astype(np.float32)


def cells(size: int, count: int) -> np.ndarray:
    """Returns an averaging matrix `[size, size]`: row i holds equal weights on the cell that contains i, which sum to
    one.
    """
    cell = np.arange(size) * count // size
    same = (cell == cell[:, None]).astype(np.float32)
    return same / same.sum(1, keepdims=True)


def sample(x: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Interpolates x `[N, H, W]` bilinearly at the coordinates `places` `[N, 2, H, W]`; outside of the
    image is black.
    """
    x = np.pad(x, [(0, 0), (1, 1), (1, 1)])
    places = np.clip(places + 1, 0, np.array(x.shape[1:])[:, None, None] - 1)
    low = np.minimum(places.astype(int), np.array(x.shape[1:])[:, None, None] - 2)
    (down, right), (i, j), n = np.moveaxis(places - low, 1, 0), np.moveaxis(low, 1, 0), np.arange(len(x))[:, None, None]
    upper = (1 - right) * x[n, i, j] + right * x[n, i, j + 1]
    lower = (1 - right) * x[n, i + 1, j] + right * x[n, i + 1, j + 1]
    return (1 - down) * upper + down * lower
