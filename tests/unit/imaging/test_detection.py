"""Lesions become targets and come back; findings are hits or not; FROC agrees with MONAI's."""

import math

import numpy as np
import pytest

from imaging.detection import (
    RATES,
    Lesion,
    Match,
    encode_lesions,
    find_boxes,
    find_lesions,
    froc,
    match_lesions,
)


def draw(*boxes, size=64):
    """One mask with a filled box for each (row, column, height, width)."""
    mask = np.zeros((size, size), dtype=np.uint8)
    for row, column, height, width in boxes:
        mask[row : row + height, column : column + width] = 1
    return mask


def answer(masks):
    """A perfect detector's logits of targets."""
    targets = encode_lesions(masks, 4)
    centre = np.log(np.clip(targets[:, 0], 1e-4, 1 - 1e-4)) - np.log1p(
        -np.clip(targets[:, 0], 1e-4, 1 - 1e-4)
    )
    return np.concatenate([centre[:, None], targets[:, 1:3]], 1)


def test_boxes_are_found_in_each_image_alone_and_touching_corners_belong_together():
    corner = draw((0, 0, 2, 2), (2, 2, 2, 4))
    found = find_boxes(np.stack([corner, draw(), draw((10, 20, 5, 3), (40, 41, 1, 2))]))
    expected = [[0, 1.5, 2.5, 4, 6, 12], [2, 12, 21, 5, 3, 15], [2, 40, 41.5, 1, 2, 2]]
    np.testing.assert_array_equal(found, expected)


def test_a_target_is_one_at_the_centre_falls_away_from_it_and_carries_the_size_there():
    target = encode_lesions(draw((8, 20, 12, 6))[None], 4)[0]  # its centre: row 13.5, column 22.5
    assert target.shape == (4, 16, 16)
    assert target.dtype == np.float32
    assert np.argwhere(target[3]).tolist() == [[3, 5]]
    np.testing.assert_allclose(np.exp(target[1:3, 3, 5]), [12, 6], rtol=1e-6)
    np.testing.assert_allclose(target[0, 3:6, 5], np.exp(-(np.arange(3.0) ** 2) / 2 / 0.5**2), rtol=1e-6)
    assert (target[0] == 1).sum() == 1


def test_the_larger_of_two_lesions_at_one_place_gives_the_size():
    target = encode_lesions(draw((8, 8, 1, 1), (10, 8, 2, 3))[None], 4)[0]
    np.testing.assert_allclose(np.exp(target[1:3, 2, 2]), [2, 3], rtol=1e-6)


def test_a_perfect_detector_gives_every_lesion_back_within_half_a_stride():
    masks = np.stack([draw((8, 20, 12, 6), (40, 40, 5, 9)), draw(), draw((0, 0, 3, 3))])
    logits = answer(masks)
    for mask, given in zip(masks, logits, strict=True):
        strong = [lesion for lesion in find_lesions(given, 4) if lesion.score > 0.9]
        boxes = find_boxes(mask[None])
        assert len(strong) == len(boxes)
        for box in boxes:
            near = [lesion for lesion in strong if math.dist((lesion.row, lesion.column), box[1:3]) <= 2**1.5]
            assert [(round(n.height), round(n.width)) for n in near] == [tuple(box[3:5])]


def test_findings_come_best_first_limited_one_a_plateau_and_cooled_by_the_temperature():
    logits = np.full((3, 16, 16), -5, dtype=np.float32)
    logits[1:] = np.log(7)
    logits[0, 2, 2:5], logits[0, 9, 9], logits[0, 14, 1] = 4, 6, 2
    found = find_lesions(logits, 4, temperature=2.0, limit=3)
    assert [round(lesion.score, 6) for lesion in found] == [
        round(1 / (1 + math.exp(-v / 2)), 6) for v in (6, 4, 2)
    ]
    assert (found[0].row, found[0].column) == (37.5, 37.5)
    assert found[1].row == 9.5
    assert found[2].height == pytest.approx(7)
    assert len(find_lesions(np.zeros((3, 16, 16), np.float32), 4)) == 1


def test_a_hit_lies_in_the_box_or_within_the_half_length_and_repeats_count_once():
    truth = draw((10, 10, 4, 20), (40, 40, 5, 5))  # middles: (11.5, 19.5) and (42, 42)
    places = [(13, 10, 0.3), (20, 20, 0.9), (22, 20, 0.8), (42, 42, 0.4), (43, 42, 0.6), (42, 45, 0.7)]
    match = match_lesions(truth, [Lesion(row, column, 5, 5, score) for row, column, score in places])
    np.testing.assert_array_equal(match.hits, [0.9, 0.6])
    np.testing.assert_array_equal(match.areas, [80, 25])
    np.testing.assert_array_equal(match.false, [0.8, 0.7])
    empty = match_lesions(draw(), [Lesion(1, 1, 2, 2, 0.5)])
    assert (len(empty.hits), empty.false.tolist()) == (0, [0.5])


def draw_matches(seed, images=40):
    rng = np.random.default_rng(seed)
    told = []
    for _ in range(images):
        hits = np.where(rng.random(rng.integers(0, 4)) < 0.8, 1, -np.inf)
        hits = hits * np.round(rng.beta(4, 2, len(hits)), 2)  # rounded, so that scores tie
        told.append(
            Match(hits, np.ones(len(hits), np.int64), np.round(rng.beta(2, 4, rng.integers(0, 9)), 2))
        )
    return told


@pytest.mark.parametrize("seed", range(4))
def test_froc_agrees_with_monai(seed):
    from monai.metrics import compute_froc_curve_data, compute_froc_score

    matches = draw_matches(seed)
    hits = np.concatenate([match.hits for match in matches])
    false = np.concatenate([match.false for match in matches])
    # MONAI leaves the lowest score out of its curve: a finding below all others makes that harmless.
    curve = compute_froc_curve_data(np.append(false, -1.0), hits[np.isfinite(hits)], len(hits), len(matches))
    found = froc(matches)
    assert found.mean == pytest.approx(compute_froc_score(*curve, eval_thresholds=RATES), abs=1e-12)
    for rate, sensitivity in zip(RATES, found.sensitivity, strict=True):
        assert sensitivity == pytest.approx(compute_froc_score(*curve, eval_thresholds=(rate,)), abs=1e-12)
    assert 0.3 < found.mean < 0.9


def test_froc_of_a_case_worked_by_hand():
    one = Match(np.array([0.9, 0.5]), np.array([4, 4]), np.array([0.7]))
    other = Match(np.array([-np.inf, 0.2]), np.array([4, 4]), np.array([0.6, 0.3]))
    # Alarms an image 0, .5, 1, 1.5 from the scores .9, .7, .6, .3; found by then 1, 1, 2 and 3 of 4.
    assert froc([one, other]).sensitivity == pytest.approx((0.25, 0.25, 0.25, 0.5, 0.75, 0.75, 0.75))
    assert math.isnan(froc([Match(np.empty(0), np.empty(0, np.int64), np.array([0.5]))]).mean)
