"""An augmentation is a draw and a transform, so it can be replayed; masks follow geometry alone."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from imaging.errors import ConfigError
from imaging.recipe import AugmentationSection
from training.augmentation import Draw, augment, draw_augmentation

TODAY = AugmentationSection(flip=True, shift_px=5, gain=0.2, offset=0.2, noise=0.1)
EVERYTHING = TODAY.model_copy(update={"rotate_deg": 30.0, "scale": 0.2, "colour": 0.2, "blur_px": 1.5})
GEOMETRY = AugmentationSection(flip=True, shift_px=5)
SHAPES = {
    "plane": (4, 1, 20, 24),
    "colour": (4, 3, 20, 24),
    "volume": (4, 1, 5, 20, 24),
    "two": (4, 2, 5, 9, 8),
}


def batch(count=12):
    rng = np.random.default_rng(0)
    masks = torch.from_numpy(rng.integers(1, 4, (count, 20, 24)))
    return masks[:, None].float(), masks


def draw(section, key=(1, 2, 3), count=12):
    return draw_augmentation(section, count, np.random.default_rng(key))


def still(count, **changed):
    """A draw that changes nothing but what is told."""
    parts = {name: np.asarray(values, np.float32) for name, values in changed.items()}
    return replace(draw(AugmentationSection(), count=count), **parts)


@pytest.fixture
def deterministic():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_draw_replayed_from_its_log_gives_the_same_bits(shape, deterministic):
    images, masks = torch.rand(shape) * 2 - 1, torch.randint(0, 4, (shape[0], *shape[2:]))
    section = EVERYTHING if shape[1] == 3 else EVERYTHING.model_copy(update={"colour": 0.0})
    told = draw(section, count=shape[0])
    log = json.loads(json.dumps(told.to_log()))
    first, second = (augment(images, masks, d) for d in (told, Draw.from_log(log)))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert [part.shape for part in first] == [images.shape, masks.shape]
    assert [part.dtype for part in first] == [torch.float32, torch.int64]
    assert not torch.equal(first[0], images)


def test_a_log_holds_every_bit_of_a_draw():
    told = draw(EVERYTHING)
    again = Draw.from_log(json.loads(json.dumps(told.to_log())))
    for name, value in vars(told).items():
        np.testing.assert_array_equal(np.asarray(value), getattr(again, name))
        assert np.asarray(value).dtype == np.asarray(getattr(again, name)).dtype


def test_parts_that_came_later_leave_the_draws_of_the_others_alone():
    today, now = draw(TODAY), draw(EVERYTHING)
    for name in ("flip", "shift", "gain", "offset", "noise", "noise_seed"):
        np.testing.assert_array_equal(getattr(today, name), getattr(now, name))


def test_a_draw_is_what_it_was_when_the_first_packages_were_made():
    # The recipe of these packages: flip, shift, gain, offset, noise, in this order, from one generator.
    generator = np.random.default_rng((1, 2, 3))
    told = draw(TODAY)
    np.testing.assert_array_equal(told.flip, generator.random(12) < 0.5)
    np.testing.assert_array_equal(told.shift, generator.integers(-5, 5, (12, 2), endpoint=True))
    np.testing.assert_array_equal(told.gain, generator.uniform(0.8, 1.2, 12).astype(np.float32))
    np.testing.assert_array_equal(told.offset, generator.uniform(-0.2, 0.2, 12).astype(np.float32))
    np.testing.assert_array_equal(told.noise, generator.uniform(0, 0.1, 12).astype(np.float32))
    assert told.noise_seed == generator.integers(2**31)


def test_images_that_only_the_first_parts_change_have_the_bits_that_they_always_had():
    images, masks = batch()
    told = draw(TODAY)
    moved, _ = augment(images, masks, replace(told, gain=np.ones_like(told.gain), offset=0 * told.offset,
                                              noise=0 * told.noise))  # fmt: skip
    field = torch.randn(images.shape, generator=torch.Generator().manual_seed(told.noise_seed))
    gain, offset, noise = (
        torch.from_numpy(v)[:, None, None, None] for v in (told.gain, told.offset, told.noise)
    )
    assert torch.equal(augment(images, masks, told)[0], moved * gain + offset + noise * field)


@pytest.mark.parametrize("key", [(2, 2, 3), (1, 3, 3), (1, 2, 4)])
def test_another_seed_epoch_or_batch_draws_otherwise(key):
    images, masks = batch()
    first, other = (augment(images, masks, draw(TODAY, k))[0] for k in ((1, 2, 3), key))
    assert not torch.equal(first, other)


def test_masks_follow_flips_and_shifts():
    images, masks = batch()  # an image that is its own mask, so both must move alike
    moved, kept = augment(images, masks, draw(GEOMETRY))
    inside = kept > 0
    assert torch.equal(moved[:, 0][inside], kept[inside].float())
    assert not torch.equal(kept, masks)
    assert inside.float().mean() > 0.5


def test_a_shift_is_by_the_drawn_pixels_and_what_comes_in_is_background():
    images, masks = batch(1)
    told = draw(AugmentationSection(shift_px=5), count=1)
    down, right = (int(v) for v in told.shift[0])
    _, kept = augment(images, masks, told)
    expected = np.zeros((20, 24), dtype=np.int64)
    for row in range(20):
        for column in range(24):
            if 0 <= row - down < 20 and 0 <= column - right < 24:
                expected[row, column] = masks[0, row - down, column - right]
    np.testing.assert_array_equal(kept[0].numpy(), expected)


def test_brightness_and_noise_leave_masks_alone():
    images, masks = batch()
    moved, kept = augment(images, masks, draw(AugmentationSection(gain=0.2, offset=0.2, noise=0.1)))
    assert torch.equal(kept, masks)
    assert not torch.equal(moved, images)


def test_gain_offset_and_noise_are_what_was_drawn():
    told = draw(AugmentationSection(gain=0.2, offset=0.2, noise=0.1), count=4)
    flat, _ = augment(torch.ones(4, 1, 200, 200), torch.zeros(4, dtype=torch.int64), told)
    np.testing.assert_allclose(flat.mean((1, 2, 3)), told.gain + told.offset, atol=0.003)
    np.testing.assert_allclose(flat.std((1, 2, 3)), told.noise, rtol=0.03, atol=1e-6)


def test_labels_pass_through_and_nothing_changes_when_all_is_off():
    images, labels = batch()[0], torch.arange(12)
    same, kept = augment(images, labels, draw(AugmentationSection()))
    assert torch.equal(same, images)
    assert kept is labels


@pytest.mark.parametrize(("degrees", "turns"), [(90, -1), (180, -2), (-90, 1)])
def test_a_quarter_turn_is_the_one_that_numpy_makes(degrees, turns):
    images, masks = torch.rand(1, 3, 18, 18), torch.randint(0, 4, (1, 18, 18))
    moved, kept = augment(images, masks, still(1, rotate_deg=[degrees]))
    np.testing.assert_allclose(moved[0], np.rot90(images[0], turns, (1, 2)), atol=2e-5)
    np.testing.assert_array_equal(kept[0], np.rot90(masks[0], turns))


def test_a_turn_keeps_the_proportions_of_an_oblong_image():
    images, masks = torch.zeros(1, 1, 21, 61), torch.zeros(1, 21, 61, dtype=torch.int64)
    masks[0, 10, 22:39] = 1  # a line along the columns, 17 long, becomes one along the rows
    _, kept = augment(images, masks, still(1, rotate_deg=[90]))
    expected = torch.zeros_like(masks)
    expected[0, 2:19, 30] = 1
    assert torch.equal(kept, expected)


@pytest.mark.parametrize("factor", [0.7, 1.4])
def test_a_scale_changes_areas_by_its_square(factor):
    y, x = np.mgrid[:64, :64] - 31.5
    masks = torch.from_numpy((np.hypot(y, x) < 18).astype(np.int64))[None]
    _, kept = augment(masks[:, None].float(), masks, still(1, scale=[factor]))
    assert float(kept.sum() / masks.sum()) == pytest.approx(factor**2, rel=0.05)  # whole pixels


@pytest.mark.parametrize("part", [{"rotate_deg": [20, -35]}, {"scale": [0.8, 1.3]}])
def test_masks_follow_turns_and_scales(part):
    y, x = np.mgrid[:48, :40]
    masks = torch.from_numpy(np.stack([np.hypot(y - 16, x - 24) < 8, np.hypot(y - 30, x - 14) < 6]) * 1)
    moved, kept = augment(masks[:, None] * 2.0 - 1, masks, still(2, **part))
    answer = moved[:, 0] > 0
    overlap = 2 * (answer & (kept == 1)).sum() / (answer.sum() + kept.sum())
    assert overlap > 0.97
    assert not torch.equal(kept, masks)


def test_every_slice_of_a_volume_and_every_channel_moves_alike():
    plane, mask = torch.rand(2, 1, 20, 24), torch.randint(0, 3, (2, 20, 24))
    told = replace(
        draw(EVERYTHING, count=2), noise=np.zeros(2, np.float32), colour=np.ones((2, 3), np.float32)
    )
    moved, kept = augment(plane, mask, told)
    volume, masks = augment(plane[:, :, None].repeat(1, 2, 4, 1, 1), mask[:, None].repeat(1, 4, 1, 1), told)
    assert torch.equal(volume, moved[:, :, None].expand_as(volume))
    assert torch.equal(masks, kept[:, None].expand_as(masks))


def test_a_blur_is_a_gaussian_of_the_drawn_width_for_each_image():
    images = torch.rand(3, 1, 30, 26)
    told = still(3, blur_px=[0, 0.8, 1.5])
    moved, _ = augment(images, torch.arange(3), told)
    assert torch.equal(moved[0], images[0])
    for image, found, width in zip(images[1:, 0], moved[1:, 0], (0.8, 1.5), strict=True):
        reach = int(np.ceil(3 * 1.5))  # the widest of the batch sets how far all look
        np.testing.assert_allclose(
            found, gaussian_filter(image, width, mode="nearest", radius=reach), atol=1e-5
        )


def test_colours_change_their_gain_from_black_and_black_stays_black():
    images = torch.stack([torch.full((3, 4, 4), -1.0), torch.zeros(3, 4, 4)])
    moved, _ = augment(images, torch.arange(2), still(2, colour=[[0.8, 1, 1.2]] * 2))
    assert torch.equal(moved[0], images[0])
    np.testing.assert_allclose(moved[1, :, 0, 0], [-0.2, 0, 0.2], atol=1e-6)


def test_colours_are_not_drawn_for_grey_images():
    with pytest.raises(ConfigError, match=r"1 channel.*augmentation\.colour"):
        augment(*batch(), draw(EVERYTHING))
