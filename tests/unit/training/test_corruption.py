"""A corruption keeps what an image is, changes more at every severity, and goes where its seed says."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from imaging.errors import ConfigError
from imaging.recipe import AugmentationSection
from imaging.vocabulary import Corruption, Modality
from training.corruption import LEVELS, SEEN, apply_to, corrupt


def texture(*shape):
    rng = np.random.default_rng(5)
    field = sum(width * gaussian_filter(rng.normal(size=shape), width) for width in (1, 3, 6))
    return (field - field.min()) / np.ptp(field)


IMAGES = {
    "CT plane": (Modality.CT, (texture(64, 60) * 1200 - 1000).astype(np.int16)),
    "CT volume": (Modality.CT, (texture(3, 40, 48) * 1200 - 1000).astype(np.int16)),
    "MR plane": (Modality.MR, (texture(64, 60) * 900).astype(np.uint16)),
    "MR volume": (Modality.MR, (texture(5, 40, 48) * 900).astype(np.float32)),
    "fundus": (Modality.FUNDUS, (texture(96, 96, 3) * 220).astype(np.uint8)),
    "slide": (Modality.SLIDE, (texture(48, 64, 3) * 200 + 40).astype(np.uint8)),
    "small grey": (Modality.OTHER, (texture(28, 28) * 230).astype(np.uint8)),
    "grey volume": (Modality.OTHER, (texture(28, 28, 28) * 230).astype(np.uint8)),
}
CASES = {
    f"{name}, {family}": (modality, pixels, family)
    for name, (modality, pixels) in IMAGES.items()
    for family in apply_to(modality, pixels.ndim == 3 and pixels.shape[-1] == 3)
}


def change(before, after):
    return np.abs(after.astype(float) - before).mean()


@pytest.mark.parametrize(("modality", "pixels", "family"), CASES.values(), ids=CASES)
def test_a_corruption_changes_more_at_every_severity_and_keeps_shape_and_type(modality, pixels, family):
    kept = pixels.copy()
    worse = [corrupt(pixels, family, severity, modality, seed=9) for severity in range(1, 6)]
    assert {(image.shape, image.dtype) for image in worse} == {(pixels.shape, pixels.dtype)}
    assert (np.diff([0, *(change(pixels, image) for image in worse)]) > 0).all()
    np.testing.assert_array_equal(pixels, kept)
    np.testing.assert_array_equal(worse[2], corrupt(pixels, family, 3, modality, seed=9))


@pytest.mark.parametrize(
    "family", [Corruption.NOISE, Corruption.OCCLUSION, Corruption.BIAS, Corruption.MOTION]
)
def test_another_seed_goes_another_way(family):
    modality, pixels = IMAGES["MR plane"]
    assert change(*(corrupt(pixels, family, 4, modality, seed).astype(float) for seed in (1, 2))) > 0


def test_what_augmentation_may_use_is_a_part_of_it_and_all_that_changes_brightness_is_named():
    geometry = {"flip", "shift_px", "rotate_deg", "scale"}
    assert {*SEEN.values()} == {*AugmentationSection.model_fields} - geometry
    assert {*LEVELS} == {*Corruption}


@pytest.mark.parametrize("modality", Modality)
def test_every_modality_has_families_that_augmentation_uses_and_more_that_it_never_does(modality):
    told = apply_to(modality, colour=False)
    seen = [family for family in told if family in SEEN]
    assert len(seen) == 4
    assert len(told) - len(seen) >= 4
    assert {*apply_to(modality, colour=True)} - {*told} == {Corruption.COLOUR}


@pytest.mark.parametrize(
    ("name", "family", "severity"),
    [
        ("CT plane", Corruption.RINGING, 1),
        ("CT plane", Corruption.COLOUR, 1),
        ("MR plane", Corruption.COMPRESSION, 1),
        ("fundus", Corruption.BIAS, 1),
        ("small grey", Corruption.MOTION, 1),
        ("fundus", Corruption.NOISE, 0),
        ("fundus", Corruption.NOISE, 6),
    ],
)
def test_what_does_not_happen_to_a_modality_is_refused(name, family, severity):
    modality, pixels = IMAGES[name]
    with pytest.raises(ConfigError, match=f"{family} at severity {severity}"):
        corrupt(pixels, family, severity, modality, seed=0)


def test_numbers_are_those_of_the_table():
    flat = np.full((200, 200), 100, np.uint8)
    noisy = corrupt(flat, Corruption.NOISE, 3, Modality.OTHER, 0)
    assert noisy.std() == pytest.approx(0.07 * 255, rel=0.03)
    assert noisy.mean() == pytest.approx(100, abs=0.3)
    seeds = range(8)
    offsets = {int(corrupt(flat, Corruption.OFFSET, 2, Modality.OTHER, seed)[0, 0]) for seed in seeds}
    assert offsets == {80, 120}  # 0.08 of 255 is 20.4
    tissue = np.full((20, 20), 0, np.int16)
    gains = {int(corrupt(tissue, Corruption.GAIN, 4, Modality.CT, seed)[0, 0]) for seed in seeds}
    assert gains == {-150, 150}  # half of 0.3 of 1000 HU, from air


def test_a_tone_curve_leaves_black_and_white_alone():
    ramp = np.tile(np.arange(256, dtype=np.uint8), (8, 1))
    curved = corrupt(ramp, Corruption.CONTRAST, 5, Modality.OTHER, 1)
    assert curved[0, 0] == 0
    assert curved[0, 255] == 255
    assert (np.diff(curved[0].astype(int)) >= 0).all()
    power = np.exp(1.0) if curved[0, 128] < 128 else np.exp(-1.0)
    assert curved[0, 128] == pytest.approx(255 * (128 / 255) ** power, abs=0.5)


def test_ghosts_repeat_the_image_along_the_rows_alone():
    point = np.zeros((64, 64), np.uint16)
    point[30:33, 40] = 1000
    ghosts = corrupt(point, Corruption.MOTION, 5, Modality.MR, 3)
    assert {*np.flatnonzero(ghosts.any(0))} == {40}
    assert len(np.flatnonzero(ghosts.any(1))) == 9
    assert ghosts.sum() == pytest.approx(point.sum(), rel=0.01)


def test_ringing_keeps_only_the_middle_of_k_space():
    _, pixels = IMAGES["MR plane"]
    rung = corrupt(pixels.astype(np.float32), Corruption.RINGING, 5, Modality.MR, 0)
    power = np.abs(np.fft.fft2(rung)) ** 2
    rows, columns = np.meshgrid(*(np.abs(np.fft.fftfreq(n)) for n in pixels.shape), indexing="ij")
    outside = np.maximum(rows, columns) > 0.28 / 2
    assert power[outside].sum() < 1e-3 * power.sum()  # a little, for the magnitude folds what is below 0
    assert (np.abs(np.fft.fft2(pixels)) ** 2)[outside].sum() > 1e-3 * power.sum()
