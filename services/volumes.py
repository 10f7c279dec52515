"""Volumes: the body found, windows of the contract's shape over it, their answers blended, slab by slab.

Most memory: 28 bytes a voxel while a file is read and prepared, and then 10 and one slab of logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from imaging.errors import WrongShape
from imaging.preparation import prepare
from imaging.vocabulary import Kind
from registry.package import Contract

MAX_VOXELS = 64 * 2**20  # 512 MiB of the widest numbers that a file can hold
MAX_BYTES = MAX_VOXELS * 8 + 4096
OVERLAP = 0.25  # of neighbouring windows, along each axis
SIGMA = 0.125  # of the blending weights, in windows: MONAI's
CHUNK_VOXELS = 2**18  # of the windows that are answered as one batch, at least two
MARGIN = 4  # voxels that are kept round the body
STEP = 2  # every second voxel is enough to find a body
RIM = 0.25  # of the way from air to tissue begins the body

Place = tuple[int, int, int]


class Step(NamedTuple):
    """Prepared images for the engine, (n, channels[, depth], rows, columns), and how far the job is.

    `images` may be empty: then the job only lets others have their turn. `progress` is 0 to 1.
    """

    images: NDArray[np.float32]
    progress: float


def check_volume(shape: tuple[int, ...], contract: Contract) -> None:
    """Refuse a volume that cannot be answered by windows.

    Args:
        shape: (depth, rows, columns) of what was sent.
        contract: a segmentation of grey volumes, which may be larger than its shape, or of grey planes: then
            every slice has exactly the plane's.

    Raises:
        WrongShape: another one.
    """
    if contract.kind is not Kind.SEGMENTATION or contract.channels != 1:
        raise WrongShape(
            f"{contract.task} does not segment grey volumes.", "Ask /predict, an image at a time."
        )
    if len(shape) != 3:
        raise WrongShape(f"The volume has shape {shape}.", "Send depth, rows, columns.")
    small = any(
        side < least for side, least in zip(shape[-len(contract.spatial) :], contract.spatial, strict=True)
    )
    if small or (not contract.depth and shape[1:] != contract.spatial):
        raise WrongShape(
            f"The volume has shape {shape}.",
            f"{contract.task} reads windows of {' x '.join(map(str, contract.spatial))} voxels, or slices of "
            "exactly as many pixels: resample, crop or pad first.",
        )


def segment(
    pixels: NDArray[np.float32], contract: Contract
) -> Generator[Step, NDArray[np.float32], NDArray[np.uint8]]:
    """Label a volume. What lies outside the body's windows is class 0.

    A volume is prepared as a whole, slices for a contract of planes one by one, as `predict` prepares both.
    Windows overlap by a quarter and their logits are blended with a Gaussian, as MONAI's sliding window does.

    Args:
        pixels: float32 (depth, rows, columns), as `decode` returns it.
        contract: that `check_volume` agreed with.

    Yields:
        Windows; to be sent their logits (n, classes[, depth], rows, columns).

    Returns:
        uint8 (depth, rows, columns).
    """
    window = (contract.depth or 1, contract.rows, contract.columns)
    body, cut = find_body(pixels), _cutter(pixels, contract)
    labels = np.zeros(pixels.shape, np.uint8)
    box = _bound(body, window)
    slab = _Slab(labels[box], len(contract.classes), window)
    places = list(_walk(body[box], window))
    count = max(2, min(contract.max_batch, CHUNK_VOXELS // math.prod(window)))
    origin = np.array([side.start for side in box])
    for first in range(0, len(places), count):
        chunk = places[first : first + count]
        logits = yield Step(np.stack([cut(*(origin + place)) for place in chunk]), first / len(places))
        for place, answer in zip(chunk, logits.reshape(len(chunk), -1, *window), strict=True):
            slab.add(place, answer)
    slab.finish()
    return labels


def find_body(pixels: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Where there is anything but air, with a margin; everywhere when no air can be told from tissue.

    Otsu's threshold parts air from tissue; the body begins a quarter of the way between their means.

    Args:
        pixels: float32 (depth, rows, columns), as stored.

    Returns:
        Of the same shape.
    """
    from scipy.ndimage import maximum_filter, uniform_filter

    steps = [STEP if side >= 16 * STEP else 1 for side in pixels.shape]
    coarse = uniform_filter(pixels[tuple(slice(None, None, step) for step in steps)], 3)
    counts, edges = np.histogram(coarse, 256)
    middles, below = (edges[1:] + edges[:-1]) / 2, np.cumsum(counts)
    sums, total = np.cumsum(counts * middles), coarse.size
    dark = sums / np.maximum(below, 1)
    bright = (sums[-1] - sums) / np.maximum(total - below, 1)
    best = int(np.argmax(below * (total - below) * (bright - dark) ** 2))
    lowest, air, tissue = edges[0], dark[best], bright[best]
    if air - lowest > RIM * (tissue - lowest):  # the darker half is tissue, too
        return np.ones(pixels.shape, bool)
    body = maximum_filter(coarse > air + RIM * (tissue - air), [2 * MARGIN // step + 1 for step in steps])
    for axis, step in enumerate(steps):
        body = np.repeat(body, step, axis)
    return np.asarray(body[tuple(slice(side) for side in pixels.shape)])


def weigh(window: tuple[int, ...]) -> NDArray[np.float32]:
    """How much each voxel of a window counts: a Gaussian round its middle, at least a thousandth."""
    weight = np.ones(())
    for side in window:
        away = np.arange(side) - (side - 1) / 2
        weight = weight[..., None] * np.exp(-(away**2) / (2 * (SIGMA * side) ** 2))
    return np.maximum(weight, max(float(weight.min()), 1e-3)).astype(np.float32)


def cover(low: int, high: int, size: int, window: int) -> list[int]:
    """Where windows begin that cover low to high (exclusive) of an axis of a size no smaller than one."""
    if high - low <= window:
        return [min(max((low + high - window) // 2, 0), size - window)]
    step = max(1, int(window * (1 - OVERLAP)))
    count = math.ceil((high - low - window) / step) + 1
    return [min(low + index * step, high - window) for index in range(count)]


def _walk(body: NDArray[np.bool_], window: Place) -> Iterator[Place]:
    """Windows in the order of depth; each slab and each band of it is covered only where the body is."""
    deep, high, wide = window
    for z in cover(*_range(body, 0), body.shape[0], deep):
        layer = body[z : z + deep]
        for y in cover(*_range(layer, 1), body.shape[1], high) if layer.any() else ():
            band = layer[:, y : y + high]
            for x in cover(*_range(band, 2), body.shape[2], wide) if band.any() else ():
                yield z, y, x


def _range(body: NDArray[np.bool_], axis: int) -> tuple[int, int]:
    """First place along an axis where the body is, and the one after the last; of an empty one, all."""
    found = np.flatnonzero(body.any(axis=tuple(other for other in range(3) if other != axis)))
    return (int(found[0]), int(found[-1]) + 1) if len(found) else (0, body.shape[axis])


def _bound(body: NDArray[np.bool_], window: Place) -> tuple[slice, slice, slice]:
    """The body's bounding box, no smaller than a window along any axis."""
    sides = []
    for axis, (size, least) in enumerate(zip(body.shape, window, strict=True)):
        low, high = _range(body, axis)
        start = cover(low, high, size, least)[0] if high - low < least else low
        sides.append(slice(start, max(high, start + least)))
    return sides[0], sides[1], sides[2]


def _cutter(
    pixels: NDArray[np.float32], contract: Contract
) -> Callable[[int, int, int], NDArray[np.float32]]:
    """What cuts a prepared window out of a volume, by its first voxel."""
    if not contract.depth:
        return lambda z, y, x: prepare(pixels[z], contract.preparation)
    prepared = prepare(pixels, contract.preparation)
    deep, high, wide = contract.spatial
    return lambda z, y, x: prepared[:, z : z + deep, y : y + high, x : x + wide]


class _Slab:
    """Weighted sums of logits over as many slices as a window has; above them all is labelled already.

    Sums need not be divided by the weights: the largest class stays the largest. Where no window was, all are
    0, and the label is 0.

    Args:
        labels: uint8 (depth, rows, columns), written as slices are finished.
        classes: how many.
        window: (depth, rows, columns).
    """

    def __init__(self, labels: NDArray[np.uint8], classes: int, window: Place) -> None:
        self._labels, self._weight, self._start = labels, weigh(window), 0
        self._sums = np.zeros((classes, window[0], *labels.shape[1:]), np.float32)

    def add(self, place: Place, logits: NDArray[np.float32]) -> None:
        """Blend the logits (classes, depth, rows, columns) of the window at a place; places never go back."""
        z, y, x = place
        high, wide = self._weight.shape[1:]
        self._advance(z)
        self._sums[:, :, y : y + high, x : x + wide] += self._weight * logits

    def finish(self) -> None:
        """Label what is left."""
        self._advance(len(self._labels))

    def _advance(self, start: int) -> None:
        """Label the slices before `start`; none of a later window is among them."""
        count = min(start - self._start, self._sums.shape[1], len(self._labels) - self._start)
        if count <= 0:
            return
        best = self._sums[0, :count].copy()
        for label, sums in enumerate(self._sums[1:, :count], 1):
            target = self._labels[self._start : self._start + count]
            target[sums > best] = label
            np.maximum(best, sums, out=best)
        kept = self._sums.shape[1] - count
        self._sums[:, :kept] = self._sums[:, count:].copy()
        self._sums[:, kept:] = 0
        self._start = start
