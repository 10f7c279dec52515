"""What can go wrong with an image between patient and network, at five severities, on stored pixels.

The families follow MedMNIST-C (Di Salvo et al. 2024) and ImageNet-C (Hendrycks and Dietterich 2019). A seed
decides which way a corruption goes (darker or brighter, where a box lies), severity only how far: the same
image with the same seed changes more at every step.
"""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.errors import ConfigError
from imaging.vocabulary import Corruption, Modality

Unit = NDArray[np.float32]  # (slices, rows, columns, channels); 0 is black and 1 about white

SEEN = {Corruption.NOISE: "noise", Corruption.BLUR: "blur_px", Corruption.GAIN: "gain",
        Corruption.OFFSET: "offset", Corruption.COLOUR: "colour"}  # fmt: skip
"""Families that augmentation may use -> the part of AugmentationSection that does; it never draws others."""

LEVELS: dict[Corruption, tuple[float, ...]] = {
    Corruption.NOISE: (0.02, 0.04, 0.07, 0.11, 0.16),  # standard deviation
    Corruption.BLUR: (0.5, 0.8, 1.1, 1.6, 2.3),  # standard deviation, pixels of an image 64 a side
    Corruption.GAIN: (0.06, 0.12, 0.2, 0.3, 0.45),  # more or less, share
    Corruption.OFFSET: (0.04, 0.08, 0.13, 0.2, 0.3),  # up or down
    Corruption.COLOUR: (0.06, 0.12, 0.2, 0.3, 0.45),  # largest change of a colour's gain
    Corruption.CONTRAST: (0.15, 0.3, 0.5, 0.7, 1.0),  # logarithm of the exponent of a tone curve
    Corruption.RESOLUTION: (1.3, 1.6, 2.1, 3.0, 4.2),  # sampled so many times more coarsely
    Corruption.COMPRESSION: (50, 30, 18, 10, 5),  # JPEG quality
    Corruption.BIAS: (0.15, 0.3, 0.45, 0.65, 0.9),  # logarithm of the largest gain of a smooth field
    Corruption.RINGING: (0.7, 0.56, 0.45, 0.36, 0.28),  # share of each axis of k-space that is kept
    Corruption.MOTION: (0.06, 0.12, 0.2, 0.3, 0.4),  # MR: share in ghosts; else a smear of 8 such pixels
    Corruption.OCCLUSION: (0.12, 0.18, 0.25, 0.33, 0.42),  # side of a black square, share of the image's
}
"""Severity 1 to 5, in shares of 255 (8 bits), of 1000 HU from air (CT), or of the 99th percentile."""

CALIBRATED = {Corruption.NOISE, Corruption.GAIN, Corruption.OFFSET}  # in HU: these go half as far on CT

_COIL, _STILL = {Corruption.BIAS, Corruption.RINGING}, {Corruption.MOTION}
NEVER = {Modality.MR: {Corruption.COMPRESSION}, Modality.CT: _COIL | _STILL, Modality.FUNDUS: _COIL,
         Modality.SLIDE: _COIL, Modality.OTHER: _COIL | _STILL}  # fmt: skip
"""What does not happen to images of a modality."""


def apply_to(modality: Modality, colour: bool) -> tuple[Corruption, ...]:
    """The families that can happen to such images, in the vocabulary's order."""
    never = NEVER[modality] | (set() if colour else {Corruption.COLOUR})
    return tuple(family for family in Corruption if family not in never)


def corrupt(
    pixels: NDArray[Any], family: Corruption, severity: int, modality: Modality, seed: int
) -> NDArray[Any]:
    """Corrupt one stored image.

    Args:
        pixels: uint8 (rows, columns[, 3]), or any type ([depth,] rows, columns); CT in HU.
        family: what goes wrong.
        severity: 1 to 5.
        modality: of the image.
        seed: which way it goes, not how far.

    Returns:
        New pixels of the same shape and type, rounded and clipped to the type.

    Raises:
        ConfigError: the family does not happen to such images, or there is no such severity.
    """
    colour = pixels.ndim == 3 and pixels.shape[-1] == 3 and pixels.dtype == np.uint8
    if family not in apply_to(modality, colour) or not 1 <= severity <= 5:
        raise ConfigError(
            f"{family} at severity {severity} does not happen to these images of {modality}.",
            f"Choose 1 to 5 of {', '.join(apply_to(modality, colour))}.",
        )
    zero, scale = _scale(pixels, modality)
    shape = (1, *pixels.shape) if colour else (-1, *pixels.shape[-2:], 1)
    unit = (pixels.reshape(shape).astype(np.float32) - zero) / scale
    level = LEVELS[family][severity - 1]
    level *= 0.5 if modality is Modality.CT and family in CALIBRATED else 1
    act = _ghosts if family is Corruption.MOTION and modality is Modality.MR else ACTS[family]
    worse = act(unit, level, np.random.default_rng(seed)).reshape(pixels.shape) * scale + zero
    if np.issubdtype(pixels.dtype, np.integer):
        limits = np.iinfo(pixels.dtype)
        worse = np.clip(np.rint(worse), limits.min, limits.max)
    return np.asarray(worse.astype(pixels.dtype))


def _scale(pixels: NDArray[Any], modality: Modality) -> tuple[np.float32, np.float32]:
    """What is black, and how far white is from it."""
    if pixels.dtype == np.uint8:
        return np.float32(0), np.float32(255)
    if modality is Modality.CT:
        return np.float32(-1000), np.float32(1000)
    return np.float32(0), np.float32(max(float(np.percentile(pixels, 99)), 1e-3))


def _gauss(unit: Unit, width: float, axes: tuple[int, ...]) -> Any:
    """Gaussian filter; width in pixels of an image 64 a side, yet of a smaller one in its own pixels."""
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(unit, width * max(1.0, min(unit.shape[1:3]) / 64), mode="nearest", axes=axes)


def _colour(unit: Unit, level: float, rng: np.random.Generator) -> Any:
    way = rng.uniform(-1, 1, 3)
    return unit * (1 + level * way / np.abs(way).max())


def _resolution(unit: Unit, level: float, rng: np.random.Generator) -> Any:
    from PIL import Image

    rows, columns = unit.shape[1:3]
    coarse = (max(1, round(columns / level)), max(1, round(rows / level)))
    box, line = Image.Resampling.BOX, Image.Resampling.BILINEAR
    planes = map(Image.fromarray, np.moveaxis(unit, 3, 1).reshape(-1, rows, columns))
    told = [np.asarray(plane.resize(coarse, box).resize((columns, rows), line)) for plane in planes]
    return np.moveaxis(np.reshape(told, (len(unit), -1, rows, columns)), 1, 3)


def _compress(unit: Unit, level: float, rng: np.random.Generator) -> Any:
    from PIL import Image

    white, told = max(1.0, float(unit.max())), []
    for picture in np.clip(np.rint(unit * (255 / white)), 0, 255).astype(np.uint8):
        stream = BytesIO()
        Image.fromarray(picture.squeeze()).save(stream, "JPEG", quality=int(level))
        told.append(np.asarray(Image.open(stream), np.float32) * (white / 255))
    return np.stack(told)


def _bias(unit: Unit, level: float, rng: np.random.Generator) -> Any:
    rows, columns = (np.linspace(-1, 1, size) for size in unit.shape[1:3])
    field = np.polynomial.polynomial.polygrid2d(rows, columns, rng.normal(0, 1, (3, 3)))[..., None]
    field -= field.mean()
    return unit * np.exp(level * field / np.abs(field).max())


def _ringing(unit: Unit, level: float, rng: np.random.Generator) -> Any:
    rows, columns = (np.abs(np.fft.fftfreq(size)) < level / 2 for size in unit.shape[1:3])
    kept = np.fft.fft2(unit, axes=(1, 2)) * (rows[:, None] & columns)[..., None]
    return np.abs(np.fft.ifft2(kept, axes=(1, 2)))  # a magnitude, as scanners store it


def _ghosts(unit: Unit, level: float, rng: np.random.Generator) -> Any:
    apart = round(unit.shape[1] * rng.uniform(0.15, 0.35))  # along the phase axis
    return unit + level * ((np.roll(unit, apart, 1) + np.roll(unit, -apart, 1)) / 2 - unit)


def _occlusion(unit: Unit, level: float, rng: np.random.Generator) -> Any:
    shape = unit.shape[1:3]
    rows, columns = (np.abs(np.arange(n) / n - rng.uniform(0.3, 0.7)) < level / 2 for n in shape)
    return np.where((rows[:, None] & columns)[..., None], 0, unit)


ACTS: dict[Corruption, Callable[[Unit, float, np.random.Generator], Any]] = {
    Corruption.NOISE: lambda unit, level, rng: unit + level * rng.standard_normal(unit.shape, np.float32),
    Corruption.BLUR: lambda unit, level, rng: _gauss(unit, level, (1, 2)),
    Corruption.GAIN: lambda unit, level, rng: unit * (1 + rng.choice((-1, 1)) * level),
    Corruption.OFFSET: lambda unit, level, rng: unit + rng.choice((-1, 1)) * level,
    Corruption.COLOUR: _colour,
    Corruption.CONTRAST: lambda unit, level, rng: np.maximum(unit, 0) ** np.exp(rng.choice((-1, 1)) * level),
    Corruption.RESOLUTION: _resolution,
    Corruption.COMPRESSION: _compress,
    Corruption.BIAS: _bias,
    Corruption.RINGING: _ringing,
    Corruption.MOTION: lambda unit, level, rng: _gauss(unit, 8 * level, (int(rng.integers(1, 3)),)),
    Corruption.OCCLUSION: _occlusion,
}
