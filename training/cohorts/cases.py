"""What every builder shares: one case, its random streams, its person, and soft shapes."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.vocabulary import AgeBand, Sex

Array = NDArray[np.float32]
Mask = NDArray[np.uint8]
Range = tuple[float, float]  # that something is drawn from
FIRST_DAY = date(2019, 1, 7)
DAYS = 5 * 365


@dataclass(frozen=True)
class Person:
    """A virtual subject: nobody.

    Attributes:
        age: years; only its band is ever written.
        sex: recorded sex.
        acquired: day of the first image.
    """

    age: float
    sex: Sex
    acquired: date

    @property
    def age_band(self) -> AgeBand:
        """The band that the age falls into."""
        limits = (40, 60, 75)
        return list(AgeBand)[sum(self.age >= limit for limit in limits)]


@dataclass(frozen=True)
class Case:
    """One image with its truth.

    Attributes:
        pixels: stored pixels: a plane (rows, columns) or a volume (depth, rows, columns), uint16 (MR,
            arbitrary units) or int16 (CT, HU); colour (rows, columns, 3), uint8 RGB. In MR and CT rows run
            from anterior to posterior, columns from the patient's right to left, slices from the feet up.
        mask: uint8 (rows, columns) or (depth, rows, columns): tissue classes, or 1 where the lesion is.
        label: number of the class, or None where the mask is the truth.
        person: whose it is.
        acquired: the day, ISO 8601.
        scanner: name of the simulated scanner.
        spacing_mm: distance of pixel centres, the same along every axis.
    """

    pixels: NDArray[Any]
    mask: NDArray[np.uint8]
    label: int | None
    person: Person
    acquired: str
    scanner: str
    spacing_mm: float


def stable_hash(*parts: str | int) -> int:
    """64 bits of sha256 of the parts: the same in every process, unlike hash()."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def stream(seed: int, task: str, site: str, subject: int, view: int = -1) -> np.random.Generator:
    """The random numbers of a subject (view -1) or of one of its views, independent of every other stream.

    Any case can so be made alone, in any order, by any number of processes, bit for bit.
    """
    entropy = [seed, stable_hash(task), stable_hash(site), subject, view + 1]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))


def draw_person(rng: np.random.Generator, mean_age: float) -> Person:
    """A person with an age around the site's mean (standard deviation 14 years, 18 to 95)."""
    age = float(np.clip(rng.normal(mean_age, 14), 18, 95))
    sex = Sex.FEMALE if rng.random() < 0.5 else Sex.MALE
    return Person(age, sex, FIRST_DAY + timedelta(days=int(rng.integers(DAYS))))


def acquired_on(person: Person, view: int) -> str:
    """The day of a view: later views follow at half a year's distance, ISO 8601."""
    return (person.acquired + timedelta(days=182 * view)).isoformat()


def soft(distance: Array, width: float) -> Array:
    """1 inside (negative distance), 0 outside, with an edge as wide as `width`, in the unit of distance."""
    return np.asarray(1 / (1 + np.exp(np.clip(distance / np.float32(width / 4), -30, 30))), dtype=np.float32)


def between(rng: np.random.Generator, limits: tuple[float, float]) -> float:
    """A number drawn evenly between two limits."""
    return float(rng.uniform(*limits))


_TURN = np.arange(14) * (2 * np.pi / 14)
CIRCLE, _WAVES = np.stack([np.cos(_TURN), np.sin(_TURN)], axis=1), np.outer((2, 3), _TURN)


def blob(
    middle: NDArray[Any], radius: float, uneven: float = 0, rng: np.random.Generator | None = None
) -> NDArray[np.float64]:
    """Outline (14, 2) of a disc whose edge waves by the share `uneven` of its radius, if `rng` is given."""
    if rng is None:
        return np.asarray(middle + radius * CIRCLE)
    waves = rng.normal(0, uneven, 2) @ np.cos(_WAVES + rng.uniform(0, 6.28, (2, 1)))
    return np.asarray(middle + (radius * (1 + waves))[:, None] * CIRCLE)


def photograph(
    light: Array, ranges: tuple[tuple[float, float], ...], rng: np.random.Generator
) -> NDArray[np.uint8]:
    """What a camera makes of light (rows, columns, 3), full scale being 1, as a JPEG file gives it back.

    Args:
        light: what falls on the sensor.
        ranges: that blur (standard deviation in pixels), noise (full scale being 1), gamma and the quality
            of the JPEG are drawn from.
        rng: the view's stream.

    Returns:
        uint8 RGB (rows, columns, 3).
    """
    from PIL import Image
    from scipy.ndimage import gaussian_filter

    blur, noise, gamma, quality = (between(rng, limits) for limits in ranges)
    seen = gaussian_filter(light, (blur, blur, 0), truncate=3)
    seen += rng.standard_normal(light.shape, dtype=np.float32) * np.float32(noise)
    seen = np.clip(seen, 0, 1) ** np.float32(gamma)
    file = io.BytesIO()
    Image.fromarray(np.rint(seen * 255).astype(np.uint8)).save(file, "JPEG", quality=round(quality))
    return np.array(Image.open(file))


class Sheet:
    """Line art in one colour, drawn finer than the pixels and then averaged.

    Args:
        shape: rows and columns of the picture.
        scale: pixels that one unit of a point's x and y is long; negative where the axis runs backwards.
    """

    FINE = 4

    def __init__(self, shape: tuple[int, int], scale: tuple[float, float] = (1.0, 1.0)) -> None:
        from PIL import Image, ImageDraw

        self._scale, self._picture = (
            np.array(scale) * self.FINE,
            Image.new("L", (shape[1] * self.FINE, shape[0] * self.FINE)),
        )
        self._middle, self._pen = np.array(shape[::-1]) * self.FINE / 2, ImageDraw.Draw(self._picture)

    def line(self, points: NDArray[Any], width: float, strength: float = 1.0) -> None:
        """A stroke along points (n, 2), x and y from the middle, as wide as `width` units."""
        thick = max(1, round(width * float(self._scale[1])))
        self._pen.line(self._place(points), fill=round(255 * strength), width=thick, joint="curve")

    def fill(self, outline: NDArray[Any], strength: float = 1.0) -> None:
        """What lies inside an outline (n, 2), x and y from the middle."""
        self._pen.polygon(self._place(outline), fill=round(255 * strength))

    def cover(self) -> Array:
        """How much of each pixel is drawn on, times its strength: (rows, columns), 0 to 1."""
        return np.asarray(self._picture.reduce(self.FINE), dtype=np.float32) / np.float32(255)

    def _place(self, points: NDArray[Any]) -> list[float]:
        return (points * self._scale + self._middle).ravel().tolist()  # type: ignore[no-any-return]
