"""The images of a split, prepared; in memory, or in an unnamed file where they are many."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.config import Places
from imaging.errors import DataError
from imaging.manifest import Pixels, read_manifest
from imaging.preparation import prepare
from imaging.recipe import TaskSection
from imaging.vocabulary import Kind, Split

IN_MEMORY_BYTES = 2**30


@dataclass(frozen=True)
class Dataset:
    """Prepared images with their truth.

    Attributes:
        images: float32 (n, channels[, depth], rows, columns), prepared; maybe a memory map.
        truth: int64 (n,) labels, or (n[, depth], rows, columns) masks.
        rows: the manifest's rows, a DataFrame in the same order.
    """

    images: NDArray[np.float32]
    truth: NDArray[np.int64]
    rows: Any

    @property
    def subjects(self) -> NDArray[Any]:
        """Who each image is of, shape (n,)."""
        return np.asarray(self.rows["subject"])

    def take(self, chosen: NDArray[Any]) -> Dataset:
        """Some of the images, by a mask (n,) of bools or by their numbers."""
        rows = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
        kept = self.rows.iloc[rows].reset_index(drop=True)
        return replace(self, images=self.images[rows], truth=self.truth[rows], rows=kept)


def load_split(places: Places, task: str, section: TaskSection, *splits: Split) -> Dataset:
    """Load and prepare the images of one or more splits.

    Raises:
        DataError: no image has such a split.
    """
    table = read_manifest(places.stage(task, "split") / "manifest.parquet")
    rows = table[table["split"].isin([str(split) for split in splits])].reset_index(drop=True)
    if rows.empty:
        raise DataError(f"{task} has no images in {', '.join(splits)}.", "Change `split` in params.yaml.")
    return load_rows(places.stage(task, "cohort"), section, rows)


def load_rows(cohort: Path, section: TaskSection, rows: Any) -> Dataset:
    """Load and prepare the images of some rows of a manifest, in their order."""
    pixels = Pixels(cohort)
    stored = (pixels.read(image, row) for image, row in _places(rows, "image"))
    images = _stack((prepare(image.astype(np.float32), section.preparation) for image in stored), len(rows))
    if section.kind is Kind.CLASSIFICATION:
        truth = rows["label"].to_numpy().astype(np.int64)
    else:
        truth = np.stack([pixels.read(mask, row) for mask, row in _places(rows, "mask")]).astype(np.int64)
    return Dataset(images, truth, rows)


def load_masks(cohort: Path, rows: Any) -> NDArray[np.uint8] | None:
    """The masks (n[, depth], rows, columns) of some rows of a manifest; None where a row has none."""
    if rows["mask"].isna().any():
        return None
    pixels = Pixels(cohort)
    return np.stack([pixels.read(mask, row) for mask, row in _places(rows, "mask")]).astype(np.uint8)


def _places(rows: Any, column: str) -> list[tuple[str, int]]:
    return [(str(shard), int(row)) for shard, row in zip(rows[column], rows["row"], strict=True)]


def _stack(images: Iterator[NDArray[np.float32]], count: int) -> NDArray[np.float32]:
    """One array (n, ...): a file that vanishes with the process holds what is too large for memory."""
    first = next(images)
    shape = (count, *first.shape)
    size = 4 * math.prod(shape)
    if size <= IN_MEMORY_BYTES:
        stacked = np.empty(shape, np.float32)
    else:
        stacked = np.memmap(tempfile.TemporaryFile(), np.float32, "w+", shape=shape)  # noqa: SIM115
    stacked[0] = first
    for number, image in enumerate(images, 1):
        stacked[number] = image
    return stacked


def stage_folder(places: Places, task: str, name: str) -> Path:
    """The folder of a stage, made."""
    folder = places.stage(task, name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
