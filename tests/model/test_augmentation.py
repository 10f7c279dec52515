"""An augmentation is a draw and a transform, so it can be replayed; masks follow geometry alone."""

import numpy as np
import pytest
import torch

from imaging.config import AugmentationSection
from training.augmentation import augment, draw_augmentation

EVERYTHING = AugmentationSection(flip=True, shift_px=5, gain=0.2, offset=0.2, noise=0.1)
GEOMETRY = AugmentationSection(flip=True, shift_px=5)


def batch(count=12):
    rng = np.random.default_rng(0)
    masks = torch.from_numpy(rng.integers(1, 4, (count, 20, 24)))
    return masks[:, None].float(), masks


def draw(section, key=(1, 2, 3), count=12):
    return draw_augmentation(section, count, np.random.default_rng(key))


def test_a_draw_replayed_gives_the_same_bits():
    images, masks = batch()
    first, second = (augment(images, masks, draw(EVERYTHING)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("key", [(2, 2, 3), (1, 3, 3), (1, 2, 4)])
def test_another_seed_epoch_or_batch_draws_otherwise(key):
    images, masks = batch()
    first, other = (augment(images, masks, draw(EVERYTHING, k))[0] for k in ((1, 2, 3), key))
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
