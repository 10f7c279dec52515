"""What an import asks for, what a format hands over, and what is taken of it: an item whole, or not at all.

What cannot be taken raises DataError, with the fact and the fix that the refusal then tells.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from imaging.config import Sites
from imaging.errors import DataError, FormularyError
from imaging.manifest import digest_pixels
from imaging.recipe import Section
from imaging.vocabulary import Kind, Modality, SiteKind, Split

BYTES = 64 << 20  # of a shard
UNSPACED = "images of unknown spacing, for which 1 mm stands"
FACTS = ("subject", "split", "label", "truth")  # that images of the same pixels must share
ODD = "images that no U-Net can halve: it needs --rows, --columns (and --depth) that 8 divides"
STORED = {"f": "float32", "i": "int16", "u": "uint16"}


class Wish(Section):
    """What is asked of an import: the options of `formulary training import`, by these names."""

    licence: str = Field(min_length=1, description="under which terms the images may be used")
    site: str = Field(description="site of images that name none; the first internal one unless told")
    classes: tuple[str, ...] = Field(default=(), description="names of the labels 0, 1, ..., with commas")
    modality: Modality | None = Field(default=None, description="MR, CT, OP, SM or OT, where it is not told")
    kind: Kind | None = Field(default=None, description="classification, segmentation or detection")
    volumes: bool = Field(default=False, description="keep volumes whole; else they become axial slices")
    rows: int | None = Field(default=None, ge=8, description="crop or pad to so many rows; of a tile too")
    columns: int | None = Field(default=None, ge=8, description="crop or pad to so many columns")
    depth: int | None = Field(default=None, ge=1, description="crop or pad volumes to so many slices")
    spacing_mm: float | None = Field(default=None, gt=0, description="resample to it; of pictures, their own")
    every: int = Field(default=1, ge=1, description="keep every so many-th slice")
    channel: int | None = Field(default=None, ge=0, description="which volume of several in a NIfTI, from 0")
    store: Literal["uint8", "uint16", "int16", "float32"] | None = Field(
        default=None, description="type of stored pixels: uint8, uint16, int16 or float32"
    )
    labels: Path | None = Field(
        default=None, description="CSV of subject, label, site, sex, age, acquired, scanner"
    )
    label_column: str | None = Field(default=None, description="of the table; a number from 0 for medmnist")
    suffix: str = Field(default="T1w", description="of a BIDS folder's images")
    mask_suffix: str | None = Field(default=None, description="of a BIDS folder's masks, e.g. dseg")
    tissue: float = Field(default=0.5, ge=0, le=1, description="least share of tissue in a tile")
    pseudonyms: bool = Field(default=False, description="write pseudonyms of subjects; dicom always does")
    redistributable: bool = Field(default=False, description="the licence lets others have the images")
    simulated: bool = Field(default=False, description="the images are simulated, and are to be called so")

    @property
    def voxels(self) -> str:
        """The type that voxels are stored in."""
        return self.store or ("int16" if self.modality is Modality.CT else "float32")

    def type_of(self, dtype: np.dtype[Any]) -> str:
        """The type that pixels of a picture are stored in; they are refused where they do not fit."""
        return self.store or ("uint8" if dtype == "u1" else STORED.get(dtype.kind, "uint8"))


class Plane(NamedTuple):
    """One stored image: ([depth,] rows, columns[, 3]), its mask without colours, and a pixel's size or 0."""

    pixels: NDArray[Any]
    mask: NDArray[np.uint8] | None
    spacing_mm: float


class Item(NamedTuple):
    """A picture, a volume or a slide, which is taken whole or not at all."""

    subject: str
    site: str
    load: Callable[[], Iterable[Plane]]
    label: int | None  # None where the mask tells
    split: Split | None  # that the source gives it
    told: Mapping[str, str]  # sex, age_band, acquired, scanner
    pieces: bool = False  # it is cut into images, of which blank ones are left out


Entry = tuple[str, Callable[[], Item | None]]
"""Where an item stands (file, and row or entry), and what makes it or raises why it cannot be taken."""


class Opened(NamedTuple):
    """A source that was looked over: its entries, and what holds for all of them."""

    total: int
    entries: Iterable[Entry]
    kind: Kind
    modality: Modality
    classes: tuple[str, ...]
    limits: tuple[str, ...] = ()  # sentences that every report repeats
    left_out: Mapping[str, int] = MappingProxyType({})  # why parts of the source are no entries, counted
    subject_split: bool = True  # it knows its subjects
    pseudonyms: bool = False  # its subjects' numbers may not be written


def insist(holds: object, fact: str, fix: str) -> None:
    """Raise DataError, with the fact and the fix, over what does not hold."""
    if not holds:
        raise DataError(fact, fix)


def refuse(key: str, fact: str, fix: str = "Leave it out.") -> Entry:
    """An entry that cannot be taken."""
    return key, partial(insist, False, fact, fix)


@contextmanager
def readable(name: str = "It") -> Iterator[None]:
    """Make an error of the house of whatever other people's parsers raise over damaged bytes."""
    try:
        yield
    except FormularyError:
        raise
    except Exception as error:
        raise DataError(f"{name} cannot be read ({type(error).__name__}).", "Is it whole?") from error


def inside(folder: Path, name: str) -> Path:
    """A file in a folder, unless it is missing or lies elsewhere (.., absolute, a link that leads out)."""
    path = folder / name
    within = not Path(name).is_absolute() and path.resolve().is_relative_to(folder.resolve())
    insist(within, f"{name[:100]!r} leads out of the folder.", "Name files inside it.")
    insist(path.is_file(), f"The file {name[:100]!r} is missing.", "Put it there, or leave the row out.")
    return path


class Intake:
    """What was taken so far, and what the next item is held against.

    Args:
        opened, sites: the source, and sites.yaml.
        folder: of the shards; None writes none.
        name: gives a subject's name in the manifest.
    """

    def __init__(
        self, opened: Opened, sites: Sites, folder: Path | None, name: Callable[[str], str] = str
    ) -> None:
        self._opened, self._sites, self._folder, self._name = opened, sites, folder, name
        self.rows: dict[str, dict[str, Any]] = {}  # the manifest's, and a few facts more, by sha256
        self.subjects: dict[str, dict[str, Any]] = {}  # of each its first row
        self.notes = Counter({note: count for note, count in opened.left_out.items() if count})
        self.refused: list[tuple[str, str]] = []  # where, and why

    @property
    def strata(self) -> Counter[tuple[str, str, str]]:
        """Images by site, given split and class."""
        names = dict(enumerate(self._opened.classes))
        rows = self.rows.values()
        return Counter((row["site"], row["split"] or "", names.get(row["label"], "")) for row in rows)

    def take(self, key: str, make: Callable[[], Item | None]) -> dict[str, Any]:
        """Take an item whole or not at all; the line that the journal keeps of it."""
        line: dict[str, Any] = {"key": key, "rows": {}, "notes": Counter()}
        try:
            for item, plane in _read(make):
                self._admit(item, {"key": key} | self._place(item), plane, line)
        except FormularyError as error:
            line = {"key": key, "refused": f"{error.fact} {error.fix}"}
        self.keep(line)
        return line

    def keep(self, line: dict[str, Any]) -> None:
        """Count what the journal says of an item, whether it was taken now or before."""
        if "refused" in line:
            self.refused.append((line["key"], line["refused"]))
            return
        self.notes.update(line["notes"])
        self.rows.update(line["rows"])
        for row in line["rows"].values():
            self.subjects.setdefault(row["subject"], row)

    def _place(self, item: Item) -> dict[str, Any]:
        """Whose an image is, unless site, split and subject do not fit each other or what was seen."""
        insist(item.subject, "It names no subject.", "Every image is of somebody.")
        kind, split = self._sites.site(item.site).kind, item.split
        name = self._name(normalize("NFC", item.subject))  # an accent may be written in two ways
        if split and kind is SiteKind.EXTERNAL and not self._opened.subject_split:
            split = Split.EXTERNAL  # a file of one site has splits of its own, but nothing of it may train
        suits = not split or (split is Split.EXTERNAL) == (kind is SiteKind.EXTERNAL)
        insist(suits, f"The split {split} does not suit {item.site}.", "External sites are external.")
        facts = {"subject": name, "site": item.site, "site_kind": kind.value, "split": split, **item.told}
        before = self.subjects.get(name, facts)
        for fact in ("site", "split", "sex"):
            told = f"{fact} {facts[fact]}, but {before[fact]} in {before.get('key')}"
            insist(facts[fact] == before[fact], f"Its subject has {told}.", "A subject has one.")
        return facts

    def _admit(self, item: Item, facts: dict[str, Any], plane: Plane, line: dict[str, Any]) -> None:
        """Store an image and add its row to the line, unless its form, mask, label or pixels are refused."""
        pixels, mask = plane.pixels, plane.mask
        low, high = float(pixels.min()), float(pixels.max())
        row = facts | {
            "sha256": digest_pixels(pixels), "label": self._judge(item, mask), "low": low, "high": high,
            "spacing_mm": plane.spacing_mm or 1.0, "form": f"{pixels.shape} {pixels.dtype}",
            "truth": "" if mask is None else digest_pixels(mask),
        }  # fmt: skip
        first = next(iter((self.rows or line["rows"]).values()), row)["form"]
        fix = "Give --rows, --columns, --depth or --store."
        insist(row["form"] == first, f"It is {row['form']}, the first {first}.", fix)
        if item.pieces and low == high:
            line["notes"]["blank images left out"] += 1
        elif row["sha256"] in line["rows"] or self._repeats(row):
            line["notes"]["repeated images left out"] += 1
        else:
            row["image"], row["row"] = self._store(len(self.rows) + len(line["rows"]), plane)
            row["mask"] = None if mask is None else row["image"].replace("images", "masks")
            sides = pixels.shape if mask is None else mask.shape
            odd = self._opened.kind is Kind.SEGMENTATION and any(side % 2 for side in sides)
            line["notes"].update([UNSPACED] * (not plane.spacing_mm) + [ODD] * odd)
            line["rows"][row["sha256"]] = row

    def _judge(self, item: Item, mask: NDArray[np.uint8] | None) -> int | None:
        """The label that it was told to have, or the highest class of its mask; a segmentation has none."""
        kind, classes = self._opened.kind, len(self._opened.classes)
        highest = -1 if mask is None else int(mask.max())
        insist(highest < classes, f"Its mask has the class {highest}.", f"Classes are 0 to {classes - 1}.")
        if kind is Kind.CLASSIFICATION:
            label = highest if item.label is None else item.label
            insist(label >= 0, "It has neither a label nor a mask.", "Give one.")
            return label
        insist(mask is not None, "It has no mask.", f"A {kind} task needs one.")
        return highest if kind is Kind.DETECTION else None

    def _repeats(self, row: dict[str, Any]) -> bool:
        """Whether a source without subjects has the pixels twice, with the same facts; else refuse them."""
        seen, known = self.rows.get(row["sha256"], row), self._opened.subject_split
        other = [name for name in FACTS if seen[name] != row[name] and (known or name != "subject")]
        told = f"Its pixels are those of {seen['key']}{f', with another {other[0]}' if other else ''}."
        insist(seen is row or not (known or other), told, "Keep one of them.")
        return seen is not row

    def _store(self, place: int, plane: Plane) -> tuple[str, int]:
        """Write image number `place` and its mask; the name of the images' shard, and the row in it.

        Shards are made at their full size, and every image goes to the operating system at once: a killed
        process loses none that its journal names.
        """
        rows = max(1, BYTES // plane.pixels.nbytes)
        number, row = divmod(place, rows)
        for stem, array in (("images", plane.pixels), ("masks", plane.mask)):
            if self._folder and array is not None:
                path = self._folder / f"{stem}-{number:04d}.npy"
                if not path.exists():
                    np.lib.format.open_memmap(path, "w+", array.dtype, (rows, *array.shape))
                with path.open("r+b") as shard:
                    shard.seek((row - rows) * array.nbytes, os.SEEK_END)
                    shard.write(np.ascontiguousarray(array).data)
        return f"images-{number:04d}.npy", row


def _read(make: Callable[[], Item | None]) -> Iterator[tuple[Item, Plane]]:
    """The images of an item; whatever other people's parsers raise over damaged bytes is a refusal."""
    with readable():
        if item := make():
            yield from ((item, plane) for plane in item.load())
