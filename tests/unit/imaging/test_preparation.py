"""The one way an image becomes a network's input."""

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from imaging.preparation import Percentiles, Preparation, Window, prepare

LUNG = Window(low_hu=-1000, high_hu=200)
MR = Percentiles(low=2, high=98)


def test_a_window_maps_its_ends_to_minus_one_and_one_and_clips_beyond():
    pixels = np.array([[-2000, -1000, -400, 200, 3000]], dtype=np.float32)
    np.testing.assert_allclose(prepare(pixels, LUNG)[0], [[-1, -1, 0, 1, 1]], atol=1e-6)


def test_percentiles_map_the_images_own_range():
    pixels = np.linspace(0, 100, 101, dtype=np.float32).reshape(1, -1)
    prepared = prepare(pixels, MR)[0, 0]
    assert prepared[2] == pytest.approx(-1, abs=1e-6)
    assert prepared[98] == pytest.approx(1, abs=1e-6)
    assert prepared[50] == pytest.approx(0, abs=1e-6)


def test_an_mr_image_in_other_units_is_prepared_alike():
    pixels = np.random.default_rng(0).gamma(2, 100, (40, 30)).astype(np.float32)
    np.testing.assert_allclose(prepare(pixels * 7 + 30, MR), prepare(pixels, MR), atol=1e-4)


def test_ct_is_not_rescaled_to_its_own_range():
    dark = np.full((8, 8), -900, np.float32)
    assert prepare(dark, LUNG).max() == pytest.approx(-1 + 100 * 2 / 1200)


@pytest.mark.parametrize("preparation", [LUNG, MR])
def test_the_result_is_one_channel_of_finite_float32(preparation):
    flat = prepare(np.zeros((6, 5), np.float32), preparation)
    assert flat.shape == (1, 6, 5)
    assert flat.dtype == np.float32
    assert np.isfinite(flat).all()


def test_the_kind_in_yaml_decides_and_another_is_refused():
    adapter = TypeAdapter(Preparation)
    assert adapter.validate_python({"kind": "window", "low_hu": -1000, "high_hu": 200}) == LUNG
    with pytest.raises(ValidationError):
        adapter.validate_python({"kind": "zscore"})
    with pytest.raises(ValidationError):
        adapter.validate_python({"kind": "percentiles", "low": 2, "high": 120})
