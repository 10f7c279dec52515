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
from registry.projection import AXES

SMALLEST_REFERENCE = 20  # subjects
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

    axes = [name for name in AXES if rows and name in rows[0]]
    table = pd.DataFrame(rows, columns=[*FACTS, *columns, *axes])
    table.sort_values(["site", "subject", "sha256"]).to_parquet(path, index=False)


def read_reference(package: Path, site: str, columns: tuple[str, ...], axes: tuple[str, ...] = ()) -> Any:
    """The reference of one site, one row a subject: their first image, since a live row is one image too.

    Returns:
        A pandas DataFrame with the columns, and the axes of embeddings that it has.

    Raises:
        DataError: the package's reference lacks a column.
    """
    import pandas as pd

    table = pd.read_parquet(package / "reference.parquet")
    missing = set(columns) - set(table.columns)
    if missing:
        raise DataError(f"reference.parquet lacks {sorted(missing)}.", "Build the package again.")
    names = [*columns, *(name for name in axes if name in table)]
    return table[table["site"] == site].drop_duplicates("subject")[names].reset_index(drop=True)


def read_table(package: Path, site: str) -> dict[str, NDArray[np.float64]]:
    """Column -> values of a site's reference, one a subject; {} where there is none. Needs no pandas."""
    import pyarrow.parquet as parquet

    path = package / "reference.parquet"
    if not path.exists():
        return {}
    table = parquet.read_table(path, filters=[("site", "=", site)])
    _, first = np.unique(np.array(table["subject"].to_pylist(), dtype=str), return_index=True)
    rows = np.sort(first)
    return {name: table[name].to_numpy()[rows] for name in table.column_names if name not in FACTS}


def read_axes(package: Path, site: str) -> NDArray[np.float64] | None:
    """Embeddings of a site's reference, (subjects, axes), one row a subject; None of an old package."""
    told = read_table(package, site)
    names = [name for name in AXES if name in told]
    return np.column_stack([told[name] for name in names]) if names and len(told[names[0]]) else None
