"""Tests the corruptions: a higher strength is further from the clean image, and equal calls give equal images."""

import numpy as np
import pytest

from experiments.data.corruptions import CORRUPTIONS, STRENGTHS, corrupt
from experiments.data.images import embedded_digits


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return embedded_digits().test.images[::20]


@pytest.mark.parametrize("name", CORRUPTIONS)
class TestEach:
    def test_stronger_is_further_away(self, name: str, images: np.ndarray) -> None:
        changed = [corrupt(images, name, strength).astype(float) for strength in STRENGTHS]
        distances = [np.mean((version - images) ** 2) for version in changed]
        assert distances[0] > 0 and all(np.diff(distances) > 0)

    def test_the_images_stay_images(self, name: str, images: np.ndarray) -> None:
        for strength in STRENGTHS:
            changed = corrupt(images, name, strength)
            assert changed.dtype == np.uint8 and changed.shape == images.shape

    def test_it_is_the_same_each_time_and_leaves_the_clean_ones(self, name: str, images: np.ndarray) -> None:
        before = images.copy()
        np.testing.assert_array_equal(corrupt(images, name, 3, seed=1), corrupt(images, name, 3, seed=1))
        np.testing.assert_array_equal(images, before)

    def test_each_image_is_corrupted_by_itself(self, name: str, images: np.ndarray) -> None:
        other = images.copy()
        other[1:] = 255 - other[1:]
        np.testing.assert_array_equal(corrupt(images, name, 3)[0], corrupt(other, name, 3)[0])


@pytest.fixture
def point() -> np.ndarray:
    """Returns an image of odd size with one white pixel in its centre."""
    image = np.zeros((1, 29, 29, 1), np.uint8)
    image[0, 14, 14] = 255
    return image


def test_another_seed_is_other_noise(images: np.ndarray) -> None:
    assert (corrupt(images, "noise", 1, seed=0) != corrupt(images, "noise", 1, seed=1)).any()


def test_noise_has_the_deviation_it_says() -> None:
    grey = np.full((20, 28, 28, 1), 128, np.uint8)
    found = corrupt(grey, "noise", 1).std() / 255
    # 15,680 pixels: the deviation of the deviation is 1/√(2·15,680) of it, 0.6 %; five times that
    assert abs(found / CORRUPTIONS["noise"][1][0] - 1) < 0.03


def test_blur_keeps_the_light(point: np.ndarray) -> None:
    """Checks that a blurred point keeps its sum, to the rounding of grey values in 13×13 pixels."""
    assert abs(corrupt(point, "blur", 5).sum(dtype=int) - 255) < 0.5 * 13**2


def test_rotation_keeps_the_middle_and_shift_moves_it(point: np.ndarray) -> None:
    assert corrupt(point, "rotation", 5)[0, 14, 14] == 255
    moved = np.argwhere(corrupt(point, "shift", 3)[0, :, :, 0] == 255)
    assert len(moved) == 1 and np.abs(moved[0] - 14).max() == 3


def test_a_shift_of_a_whole_image_is_exact(images: np.ndarray) -> None:
    """Checks that each shifted image is a crop of the clean one on a black background."""
    padded = np.pad(images[:5, ..., 0], [(0, 0), (4, 4), (4, 4)])
    for clean, changed in zip(padded, corrupt(images[:5], "shift", 4)[..., 0], strict=True):
        cuts = [clean[4 - i : 32 - i, 4 - j : 32 - j] for i in (-4, 0, 4) for j in (-4, 0, 4) if i or j]
        assert any((changed == cut).all() for cut in cuts)


def test_pixelation_keeps_the_mean_of_each_cell(images: np.ndarray) -> None:
    """Checks strength 2, cells of 2×2, to the rounding of grey values."""
    cells = [
        part[..., 0].reshape(-1, 14, 2, 14, 2).astype(float) for part in (images, corrupt(images, "pixelation", 2))
    ]
    assert np.abs(cells[0].mean((2, 4)) - cells[1].mean((2, 4))).max() <= 0.5 + 1e-4
    assert (cells[1] == cells[1][:, :, :1, :, :1]).all()
