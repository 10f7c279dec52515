"""What later data are compared with: the internal validation set, per site, one row a subject."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.errors import DataError
from imaging.statistics import STATISTICS
from imaging.vocabulary import Kind

FACTS = ("sha256", "subject", "site", "split")


def name_columns(kind: Kind, classes: tuple[str, ...]) -> tuple[str, ...]:
    """Every column that is compared: statistics of the image, then scores of the answer."""
    if kind is Kind.CLASSIFICATION:
        return (*STATISTICS, "probability", "uncertainty")
    return (*STATISTICS, *(f"share_{name.replace(' ', '_')}" for name in classes[1:]), "uncertainty")


def summarise(kind: Kind, classes: tuple[str, ...], probabilities: NDArray[np.float32]) -> dict[str, float]:
    """The scores of one answer as a few numbers.

    Args:
        kind: of the task.
        classes: names of the labels.
        probabilities: float32 (classes,) or (classes, rows, columns).

    Returns:
        Classification: probability of the positive class. Segmentation: share of the image's area that each
        class but the first gets. Both: uncertainty, the mean entropy in nats.
    """
    entropy = float(-(probabilities * np.log(np.maximum(probabilities, 1e-12))).sum(axis=0).mean())
    if kind is Kind.CLASSIFICATION:
        return {"probability": float(probabilities[1]), "uncertainty": entropy}
    labels = probabilities.argmax(axis=0)
    shares = {
        f"share_{name.replace(' ', '_')}": float((labels == label).mean())
        for label, name in enumerate(classes)
        if label
    }
    return {**shares, "uncertainty": entropy}


def write_reference(rows: list[dict[str, Any]], columns: tuple[str, ...], path: Path) -> None:
    """Write reference.parquet, one row an image, the same bytes in every process."""
    import pandas as pd

    table = pd.DataFrame(rows, columns=[*FACTS, *columns])
    table.sort_values(["site", "subject", "sha256"]).to_parquet(path, index=False)


def read_reference(package: Path, site: str, columns: tuple[str, ...]) -> Any:
    """The reference of one site, one row a subject: their first image, since a live row is one image too.

    Returns:
        A pandas DataFrame with the columns.

    Raises:
        DataError: the package's reference lacks a column.
    """
    import pandas as pd

    table = pd.read_parquet(package / "reference.parquet")
    missing = set(columns) - set(table.columns)
    if missing:
        raise DataError(f"reference.parquet lacks {sorted(missing)}.", "Build the package again.")
    return table[table["site"] == site].drop_duplicates("subject")[list(columns)].reset_index(drop=True)
