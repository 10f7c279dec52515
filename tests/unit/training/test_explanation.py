"""An audit of maps counts what it says, against baselines worked out by hand or by other means."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.stats import hypergeom, spearmanr

from imaging.recipe import EvaluateSection, ExplanationSection
from training.datasets import Dataset
from training.explanation import audit_explanations, measure_maps

SIZE, COUNT, CELL, REACH = 32, 40, 4, 2
HOW = EvaluateSection(
    engine="openvino", precision="f32", confidence=0.95, seed=3, explanation=ExplanationSection(images=COUNT)
)


def enlarge(cells):
    import torch

    told = torch.from_numpy(cells[:, None].astype(np.float32))
    return torch.nn.functional.interpolate(told, scale_factor=CELL, mode="bilinear")[:, 0].numpy()


def random_maps(seed, count=COUNT):
    return enlarge(np.random.default_rng(seed).random((count, SIZE // CELL, SIZE // CELL)))


def draw_lesions(seed=0, count=COUNT):
    """Discs anywhere on noise that says nothing of them; two images a subject."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    middle = rng.integers(4, SIZE - 4, (2, count, 1, 1))
    masks = (np.hypot(y - middle[0], x - middle[1]) < 4).astype(np.uint8)
    images = rng.normal(0, 0.3, (count, 1, SIZE, SIZE)).astype(np.float32)
    return Dataset(images, masks, pd.DataFrame({"subject": [f"s{i // 2:03d}" for i in range(count)]}))


def point_at(masks):
    return enlarge(masks.reshape(len(masks), SIZE // CELL, CELL, SIZE // CELL, CELL).mean(axis=(2, 4)))


def audit(lesions, heat, how=HOW, score=lambda images: images.mean(axis=(1, 2, 3))):
    return audit_explanations(lesions, [heat, *(random_maps(seed) for seed in (1, 2, 3))], score, how)


def test_measures_are_those_worked_by_hand():
    heat = np.zeros((2, 4, 4))
    heat[0, 0, :3] = 6, 3, 1
    mask = np.zeros((2, 4, 4), dtype=bool)
    mask[:, 0, 1:3] = True
    near = np.zeros((2, 4, 4), dtype=bool)
    near[:, :2, :] = True
    hits, energy, iou = measure_maps(heat, mask, near)
    assert hits.tolist() == [1, 0]  # the second is blank and points nowhere
    assert energy.tolist() == pytest.approx([0.4, 0])
    assert iou[0] == pytest.approx(1 / 3)  # the two hottest pixels, one of them on the lesion's two
    assert measure_maps(heat, mask, mask)[0].tolist() == [0, 0]  # without the tolerance


def test_tied_maxima_count_by_the_share_on_the_lesion():
    heat, mask = np.zeros((1, 4, 4)), np.zeros((1, 4, 4), dtype=bool)
    heat[0, 0] = 1
    mask[0, 0, 0] = True
    assert measure_maps(heat, mask, mask)[:, 0].tolist() == pytest.approx([0.25, 0.25, 0.25 / 1.75])


def test_chance_is_what_shuffled_maps_measure():
    lesions, shuffled = draw_lesions(), np.random.default_rng(9)
    maps = shuffled.random((COUNT * 20, SIZE, SIZE))
    masks = np.repeat(lesions.truth > 0, 20, axis=0)
    told = audit(lesions, point_at(lesions.truth))["baselines"]["chance"]
    _, energy, iou = measure_maps(maps, masks, masks).mean(axis=1)
    assert (told["energy"], told["iou"]) == pytest.approx((energy, iou), rel=0.05)
    area = int(masks[0].sum())
    drawn = np.arange(area + 1)
    exact = (drawn / (2 * area - drawn) * hypergeom.pmf(drawn, SIZE**2, area, area)).sum()
    assert told["iou"] == pytest.approx(exact, rel=0.05)
    reach = np.pad(lesions.truth, ((0, 0), (REACH, REACH), (REACH, REACH)))
    near = np.lib.stride_tricks.sliding_window_view(reach, (2 * REACH + 1,) * 2, (1, 2)).any(axis=(3, 4))
    assert told["hits"] == pytest.approx(near.mean(), abs=1e-4)


def test_maps_of_the_lesion_pass_and_say_why():
    lesions = draw_lesions()
    told = audit(lesions, point_at(lesions.truth))
    assert told["passed"] is True
    assert told["measures"]["hits"]["estimate"] == 1
    assert told["tolerance_px"] == [REACH, REACH]
    assert (told["images"], told["subjects"], len(told["reasons"])) == (COUNT, COUNT // 2, 7)


def test_maps_of_something_else_fail_and_the_reasons_name_the_baselines():
    told = audit(draw_lesions(), random_maps(7))
    assert told["passed"] is False
    assert any("chance" in reason for reason in told["reasons"])
    assert not any("Rank correlation" in reason for reason in told["reasons"])  # that held


def test_maps_that_random_weights_make_too_fail():
    lesions = draw_lesions()
    heat = point_at(lesions.truth) + 2 * random_maps(1)
    told = audit_explanations(lesions, [heat, *(random_maps(1) * (1 + s) for s in range(3))], mean_of, HOW)
    rho = [spearmanr(a, b, axis=None).statistic for a, b in zip(heat, random_maps(1), strict=True)]
    assert told["randomisation"]["rho"]["estimate"] == pytest.approx(np.abs(rho).mean(), abs=1e-4)
    assert told["passed"] is False
    assert any("Rank correlation" in reason for reason in told["reasons"])


def mean_of(images):
    return images.mean(axis=(1, 2, 3))


@pytest.mark.parametrize("sign", [1, -1], ids=["brightest", "darkest"])
def test_a_lesion_that_is_the_brightest_or_darkest_spot_proves_nothing(sign):
    lesions = draw_lesions()
    images = lesions.images + sign * 9 * lesions.truth[:, None].astype(np.float32)
    told = audit(Dataset(images, lesions.truth, lesions.rows), point_at(lesions.truth))
    named = "brightest" if sign > 0 else "darkest"
    assert told["baselines"][f"the {named} spot"]["hits"] == 1
    assert told["passed"] is False
    assert [named in reason for reason in told["reasons"]] == [True]


def test_lesions_in_the_middle_prove_nothing():
    lesions = draw_lesions()
    masks = np.zeros_like(lesions.truth)
    masks[:, 12:20, 12:20] = 1
    told = audit(Dataset(lesions.images, masks, lesions.rows), point_at(masks))
    assert told["baselines"]["the middle"]["hits"] == 1
    assert ["middle" in reason for reason in told["reasons"]] == [True]


def test_a_difference_that_never_varies_still_has_an_interval_by_subject():
    lesions = draw_lesions()
    dark = [np.zeros((COUNT, SIZE, SIZE), dtype=np.float32)] * 3
    few = Dataset(lesions.images[:4], lesions.truth[:4], lesions.rows[:4])
    all_of, of_two = (
        audit_explanations(part, [point_at(part.truth), *(d[: len(part.truth)] for d in dark)], mean_of, HOW)
        for part in (lesions, few)
    )
    found = all_of["differences"]["random weights"]
    low = 2 * 20 / (20 + 1.959964**2) - 1  # Wilson's lower end of 20 of 20, on the scale -1 to 1
    assert (found["estimate"], found["low"]) == (1, pytest.approx(low, abs=1e-4))
    assert of_two["differences"]["random weights"]["low"] < 0
    assert of_two["passed"] is False
    assert any("2 subjects" in reason for reason in of_two["reasons"])


def test_deletion_compares_hot_pixels_with_a_patch_elsewhere():
    lesions = draw_lesions()
    marked = lesions.images + 3 * lesions.truth[:, None].astype(np.float32)
    told = audit(
        Dataset(marked, lesions.truth, lesions.rows),
        point_at(lesions.truth),
        score=lambda images: np.clip(images - 1, 0, None).mean(axis=(1, 2, 3)),
    )["deletion"]
    whole = np.clip(marked - 1, 0, None).mean()
    assert told["heated"] > 0.8 * whole > 4 * told["elsewhere"] > 0
    assert told["passed"] is True
    assert audit(lesions, np.zeros_like(random_maps(0)))["deletion"]["passed"] is False


def test_two_audits_are_the_same_bytes_of_plain_json():
    lesions = draw_lesions()
    first, second = (json.dumps(audit(lesions, random_maps(4)), allow_nan=False) for _ in range(2))
    assert first == second


def test_volumes_and_colours_are_audited_alike():
    rng = np.random.default_rng(2)
    masks = np.zeros((COUNT, 8, 16, 16), dtype=np.uint8)
    for mask, at in zip(masks, rng.integers(1, 6, COUNT), strict=True):
        mask[at : at + 2, 2 * at : 2 * at + 3, 12 - at : 15 - at] = 1
    rows = pd.DataFrame({"subject": np.arange(COUNT).astype(str)})
    volumes = Dataset(rng.random((COUNT, 1, 8, 16, 16), dtype=np.float32), masks, rows)
    untrained = [rng.random(masks.shape, dtype=np.float32) for _ in range(3)]
    told = audit_explanations(volumes, [masks.astype(np.float32), *untrained], mean_of_all, HOW)
    assert told["measures"]["iou"]["estimate"] == 1
    lesions = draw_lesions()
    colours = Dataset(np.repeat(lesions.images, 3, axis=1), lesions.truth, lesions.rows)
    alike = [audit(data, point_at(lesions.truth)) for data in (lesions, colours)]
    assert alike[0]["measures"] == alike[1]["measures"]


def mean_of_all(images):
    return images.reshape(len(images), -1).mean(axis=1)
