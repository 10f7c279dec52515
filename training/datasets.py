"""The images of a split, prepared and in memory: the slices are small, and a network should never wait."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.config import Places, TaskSection
from imaging.errors import DataError
from imaging.manifest import Pixels, read_manifest
from imaging.preparation import prepare
from imaging.vocabulary import Kind, Split


@dataclass(frozen=True)
class Dataset:
    """Prepared images with their truth.

    Attributes:
        images: float32 (n, 1, rows, columns), prepared.
        truth: int64 (n,) labels, or (n, rows, columns) masks.
        rows: the manifest's rows, a DataFrame in the same order.
    """

    images: NDArray[np.float32]
    truth: NDArray[np.int64]
    rows: Any

    @property
    def subjects(self) -> NDArray[Any]:
        """Who each image is of, shape (n,)."""
        return np.asarray(self.rows["subject"])


def load_split(places: Places, task: str, section: TaskSection, *splits: Split) -> Dataset:
    """Load and prepare the images of one or more splits.

    Raises:
        DataError: no image has such a split.
    """
    table = read_manifest(places.stage(task, "split") / "manifest.parquet")
    rows = table[table["split"].isin([str(split) for split in splits])].reset_index(drop=True)
    if rows.empty:
        raise DataError(f"{task} has no images in {', '.join(splits)}.", "Change `split` in params.yaml.")
    pixels = Pixels(places.stage(task, "cohort"))
    images = np.stack([_prepared(pixels, image, row, section) for image, row in _places(rows, "image")])
    if section.kind is Kind.SEGMENTATION:
        truth = np.stack([pixels.read(mask, row) for mask, row in _places(rows, "mask")]).astype(np.int64)
    else:
        truth = rows["label"].to_numpy().astype(np.int64)
    return Dataset(images, truth, rows)


def _places(rows: Any, column: str) -> list[tuple[str, int]]:
    return [(str(shard), int(row)) for shard, row in zip(rows[column], rows["row"], strict=True)]


def _prepared(pixels: Pixels, image: str, row: int, section: TaskSection) -> NDArray[np.float32]:
    return prepare(pixels.read(image, row).astype(np.float32), section.preparation)


def stage_folder(places: Places, task: str, name: str) -> Path:
    """The folder of a stage, made."""
    folder = places.stage(task, name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
