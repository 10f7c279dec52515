"""The manifest: one row an image. The only place that knows its columns."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.errors import DataError

COLUMNS = (
    "image",
    "row",
    "sha256",
    "subject",
    "site",
    "site_kind",
    "scanner",
    "acquired",
    "age_band",
    "sex",
    "modality",
    "spacing_mm",
    "label",
    "mask",
    "licence",
    "redistributable",
    "simulated",
)
"""image and mask name the .npy shard (mask may be null), row the index in it; spacing_mm is square, in mm."""


def digest_pixels(pixels: NDArray[Any]) -> str:
    """sha256 of shape, type and bytes, in hexadecimal: the name of an image everywhere."""
    head = f"{pixels.dtype.str}{pixels.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def digest_file(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows as parquet, in their order, the same bytes in every process.

    Raises:
        DataError: a row lacks a column or has one too many.
    """
    import pandas as pd

    for number, row in enumerate(rows):
        if set(row) != set(COLUMNS):
            raise DataError(
                f"Row {number} has the wrong columns: {sorted(set(row) ^ set(COLUMNS))}.",
                f"A manifest row has exactly {', '.join(COLUMNS)}.",
            )
    pd.DataFrame(rows, columns=list(COLUMNS)).to_parquet(path, index=False)


def read_manifest(path: Path) -> Any:
    """Read a manifest, with its `split` column where the split stage wrote one.

    Returns:
        A pandas DataFrame with `COLUMNS` (and `split`).

    Raises:
        DataError: the file is not there or lacks a column.
    """
    import pandas as pd

    if not path.exists():
        raise DataError(f"There is no manifest at {path}.", "Run `dvc repro` first.")
    table = pd.read_parquet(path)
    missing = set(COLUMNS) - set(table.columns)
    if missing:
        raise DataError(f"The manifest {path} lacks {sorted(missing)}.", "Build the cohort again.")
    return table


class Pixels:
    """The shards of a cohort, opened as memory maps once each.

    Args:
        folder: where the .npy shards lie.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shards: dict[str, NDArray[Any]] = {}

    def read(self, shard: str, row: int) -> NDArray[Any]:
        """One stored image or mask, (rows, columns), in the shard's own type.

        Raises:
            DataError: no such shard or row.
        """
        if shard not in self._shards:
            path = self._folder / Path(shard).name
            if not path.exists():
                raise DataError(f"The shard {path} is missing.", "Run `dvc checkout` or `dvc repro`.")
            self._shards[shard] = np.load(path, mmap_mode="r", allow_pickle=False)
        if not 0 <= row < len(self._shards[shard]):
            raise DataError(f"{shard} has no row {row}.", "Build the cohort again.")
        return np.asarray(self._shards[shard][row])
