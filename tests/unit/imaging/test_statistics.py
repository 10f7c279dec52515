"""Six numbers that tell how an image was acquired."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from imaging.image import COLOURS, STATISTICS, describe


def anatomy(rows=96, columns=112):
    y, x = np.mgrid[0:rows, 0:columns]
    return 0.6 * np.sin(y / 15) * np.cos(x / 20)


def noisy(sigma, seed=0):
    noise = np.random.default_rng(seed).normal(0, 1, (96, 112))
    return (anatomy() + sigma * noise)[None].astype(np.float32)


@pytest.mark.parametrize("sigma", [0.02, 0.05, 0.1, 0.3])
def test_noise_is_the_standard_deviation_that_was_added(sigma):
    assert describe(noisy(sigma))["noise"] == pytest.approx(sigma, rel=0.05)


def test_anatomy_without_noise_has_next_to_none():
    assert describe(noisy(0.0))["noise"] < 0.001


def test_blur_lowers_sharpness():
    sharp = noisy(0.1)
    soft = gaussian_filter(sharp[0], 1.5)[None]
    assert describe(soft)["sharpness"] < 0.7 * describe(sharp)["sharpness"]


def test_percentiles_and_contrast_are_numpys():
    image = noisy(0.1)
    told = describe(image)
    expected = np.percentile(image.astype(np.float64), [5, 50, 95])
    assert [told["background"], told["median"], told["bright"]] == pytest.approx(list(expected))
    assert told["contrast"] == pytest.approx(float(image.astype(np.float64).std()))


def test_every_statistic_is_told_and_finite_even_of_an_empty_image():
    told = describe(np.zeros((1, 16, 16), np.float32))
    assert tuple(told) == STATISTICS
    assert all(np.isfinite(value) for value in told.values())


@pytest.mark.parametrize("shape", [(1, 4, 16, 16), (3, 16, 16)])
def test_volumes_and_colours_are_described_too(shape):
    told = describe(np.random.default_rng(0).normal(size=shape).astype(np.float32))
    assert tuple(told) == STATISTICS + (COLOURS if shape[0] == 3 else ())
    assert told["noise"] == pytest.approx(1, abs=0.2)  # of white noise, its standard deviation


def test_red_and_blue_are_told_against_green():
    image = np.stack([np.full((16, 16), level, np.float32) for level in (0.5, 0.25, -0.25)])
    told = describe(image)
    assert (told["red"], told["blue"]) == (0.25, -0.5)
