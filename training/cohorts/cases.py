"""What every builder shares: one case, its random streams, its person, and soft shapes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.vocabulary import AgeBand, Sex

Array = NDArray[np.float32]
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
        pixels: stored pixels (rows, columns), uint16 (MR, arbitrary units) or int16 (CT, HU). Rows run from
            anterior to posterior, columns from the patient's right to left.
        mask: uint8 (rows, columns): tissue classes, or 1 where the lesion is.
        label: 0 or 1, or None where the mask is the truth.
        person: whose it is.
        acquired: the day, ISO 8601.
        scanner: name of the simulated scanner.
        spacing_mm: distance of pixel centres.
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
