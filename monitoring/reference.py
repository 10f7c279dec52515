"""What later data are compared with: the internal validation set, per site, one row a subject."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.errors import DataError
from imaging.image import COLOURS, STATISTICS
from imaging.vocabulary import Kind
from registry.package import Contract

FACTS = ("sha256", "subject", "site", "split")


def name_columns(contract: Contract) -> tuple[str, ...]:
    """Every column that is compared: statistics of the image, then scores of the answer."""
    seen = (*STATISTICS, *(COLOURS if contract.channels == 3 else ()))
    if contract.kind is not Kind.SEGMENTATION:
        return (*seen, "probability", "uncertainty")
    return (*seen, *(f"share_{name.replace(' ', '_')}" for name in contract.classes[1:]), "uncertainty")


def summarise(contract: Contract, probabilities: NDArray[np.float32]) -> dict[str, float]:
    """The scores of one answer as a few numbers.

    Args:
        contract: of the package that answered.
        probabilities: float32 (classes[[, depth], rows, columns]); of a detector (1, rows / 4, columns / 4).

    Returns:
        Classification and detection: probability, that the image is positive. Segmentation: share of the
        image that each class but the first gets. All: uncertainty, the mean entropy in nats.
    """
    if contract.kind is Kind.DETECTION:
        probabilities = np.concatenate([1 - probabilities, probabilities])
    entropy = float(-(probabilities * np.log(np.maximum(probabilities, 1e-12))).sum(axis=0).mean())
    if contract.kind is not Kind.SEGMENTATION:
        score = contract.score(probabilities[None, -1:] if probabilities.ndim > 1 else probabilities[None])
        return {"probability": float(score[0]), "uncertainty": entropy}
    labels = probabilities.argmax(axis=0)
    shares = {
        f"share_{name.replace(' ', '_')}": float((labels == label).mean())
        for label, name in enumerate(contract.classes)
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
