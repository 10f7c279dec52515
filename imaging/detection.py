"""Lesions as centres and boxes: a detector's targets, its findings, and how good they are (FROC)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # false positives an image, as in LUNA16
STRIDE = 4  # pixels between the places where a detector looks for a centre


@dataclass(frozen=True)
class Lesion:
    """A finding: centre and box in pixels, score 0 to 1."""

    row: float
    column: float
    height: float
    width: float
    score: float


@dataclass(frozen=True)
class Match:
    """Of each true lesion the best score that hit it (-inf: none) and its pixels; scores that hit nothing."""

    hits: NDArray[np.float64]
    areas: NDArray[np.int64]
    false: NDArray[np.float64]


@dataclass(frozen=True)
class Froc:
    """Sensitivity by lesion at each of `RATES`, and their mean (the CPM of LUNA16); NaN without lesions."""

    sensitivity: tuple[float, ...]
    mean: float


def find_boxes(masks: NDArray[np.integer]) -> NDArray[np.float64]:
    """Boxes of the connected lesions (8 neighbours) of masks, integer (n, rows, columns), 0 outside lesions.

    Returns:
        (lesions, 6): image, centre row, centre column, height, width, area, in pixels.
    """
    from scipy.ndimage import find_objects, label

    plane = np.zeros((3, 3, 3), dtype=bool)
    plane[1] = True  # images do not touch
    labels, _ = label(masks > 0, plane)
    boxes = []
    for number, (image, rows, columns) in enumerate(find_objects(labels), start=1):
        sides = rows.stop - rows.start, columns.stop - columns.start
        centre = (rows.start + rows.stop - 1) / 2, (columns.start + columns.stop - 1) / 2
        boxes.append((image.start, *centre, *sides, (labels[image, rows, columns] == number).sum()))
    return np.array(boxes, dtype=np.float64).reshape(-1, 6)


def encode_lesions(masks: NDArray[np.integer], stride: int) -> NDArray[np.float32]:
    """A detector's targets.

    Args:
        masks: integer (n, rows, columns), 0 outside lesions; the stride divides rows and columns.
        stride: pixels between the places of the answer.

    Returns:
        float32 (n, 4, rows/stride, columns/stride): a Gaussian bump of height 1 at each centre (its SD is a
        sixth of the box), log height and log width in pixels at the centres, and 1 where those count.
    """
    count, *sides = masks.shape
    targets = np.zeros((count, 4, sides[0] // stride, sides[1] // stride), dtype=np.float32)
    grid = np.arange(targets.shape[2])[:, None], np.arange(targets.shape[3])[None, :]
    boxes = find_boxes(masks)
    for box in boxes[np.argsort(boxes[:, 5], kind="stable")]:  # of two at one place, the larger counts
        image, place = int(box[0]), (int((box[1] + 0.5) / stride), int((box[2] + 0.5) / stride))
        spread = np.maximum(box[3:5] / stride / 6, 0.5)
        squares = sum(((grid[axis] - place[axis]) / spread[axis]) ** 2 for axis in (0, 1))
        targets[image, 0] = np.maximum(targets[image, 0], np.exp(-squares / 2))
        targets[image, 1:, place[0], place[1]] = *np.log(box[3:5]), 1
    return targets


def find_lesions(
    logits: NDArray[np.float32], stride: int, temperature: float = 1.0, limit: int = 20
) -> list[Lesion]:
    """Findings of one image, best first: places that no neighbour exceeds.

    Args:
        logits: float32 (3, rows/stride, columns/stride): centre, log height px, log width px.
        stride: pixels between the places.
        temperature: divides the centre's logit before the sigmoid.
        limit: most findings.
    """
    from scipy.ndimage import label, maximum_filter

    centre = logits[0].astype(np.float64)
    peaks, _ = label(centre == maximum_filter(centre, 3), np.ones((3, 3)))
    numbers, places = np.unique(peaks, return_index=True)
    places = places[numbers > 0]  # a plateau of equal places is one peak
    places = places[np.argsort(-centre.ravel()[places], kind="stable")][:limit]
    found = []
    for row, column in zip(*np.unravel_index(places, centre.shape), strict=True):
        height, width = np.exp(np.clip(logits[1:, row, column].astype(np.float64), 0, 10))
        score = 1 / (1 + np.exp(-np.clip(centre[row, column] / temperature, -50, 50)))
        down, right = (float(row) + 0.5) * stride - 0.5, (float(column) + 0.5) * stride - 0.5
        found.append(Lesion(down, right, float(height), float(width), float(score)))
    return found


def match_lesions(truth: NDArray[np.integer], found: Sequence[Lesion]) -> Match:
    """Which lesions of one image, integer (rows, columns), were found.

    A hit's centre lies in the lesion's box, or within half its longer side of the middle. A second finding of
    a lesion counts neither for nor against; one that hits two belongs to the nearer.
    """
    boxes = find_boxes(truth[None])
    hits, false = np.full(len(boxes), -np.inf), []
    for lesion in found:
        away = np.abs(boxes[:, 1:3] - (lesion.row, lesion.column))
        distance = np.hypot(away[:, 0], away[:, 1])
        near = (away <= boxes[:, 3:5] / 2).all(axis=1) | (distance <= boxes[:, 3:5].max(axis=1) / 2)
        if near.any():
            nearest = int(np.where(near, distance, np.inf).argmin())
            hits[nearest] = max(hits[nearest], lesion.score)
        else:
            false.append(lesion.score)
    return Match(hits, boxes[:, 5].astype(np.int64), np.array(false))


def froc(matches: Sequence[Match]) -> Froc:
    """Free-response ROC over images: interpolated sensitivity at `RATES` false positives an image.

    To resample subjects, match once and give the matches of the drawn images.
    """
    hits = np.concatenate([match.hits for match in matches])
    false = np.sort(np.concatenate([match.false for match in matches]))
    if not len(hits):
        return Froc((float("nan"),) * len(RATES), float("nan"))
    scores = np.unique(np.concatenate([hits[np.isfinite(hits)], false, [np.inf]]))[::-1]
    hits = np.sort(hits)
    alarms = (len(false) - np.searchsorted(false, scores)) / len(matches)
    shares = (len(hits) - np.searchsorted(hits, scores)) / len(hits)
    sensitivity = np.interp(RATES, alarms, shares)
    return Froc(tuple(float(value) for value in sensitivity), float(sensitivity.mean()))
