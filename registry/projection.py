"""From a network's embedding to a few numbers that a journal can keep: principal axes of the reference."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.errors import TrustError
from registry.package import PROJECTION

AXES = tuple(f"e{number}" for number in range(8))


@dataclass(frozen=True)
class Projection:
    """Axes along which the reference's embeddings differ most.

    Attributes:
        mean: of the reference, float32 (features,).
        axes: float32 (features, axes); what is projected has standard deviation 1 in the reference.
    """

    mean: NDArray[np.float32]
    axes: NDArray[np.float32]

    def apply(self, embedding: NDArray[np.float32]) -> dict[str, float]:
        """One embedding, (features,), as e0, e1, ...: standard deviations of the reference."""
        told = (embedding - self.mean) @ self.axes
        return {name: round(float(value), 4) for name, value in zip(AXES, told, strict=False)}


def fit_projection(embeddings: NDArray[np.float32]) -> Projection:
    """Principal axes by SVD, the largest weight of each positive, so that every run gives the same.

    Args:
        embeddings: of the reference, (images, features); an axis along which nothing differs is left out.
    """
    mean = embeddings.mean(axis=0, dtype=np.float64)
    _, spread, turned = np.linalg.svd(embeddings - mean, full_matrices=False)
    kept = min(len(AXES), int((spread > 1e-6 * max(spread[0], 1e-12)).sum()) if len(spread) else 0)
    axes = turned[:kept].T
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), range(kept)])
    scaled = axes / (spread[:kept] / np.sqrt(max(len(embeddings) - 1, 1)))
    return Projection(mean.astype(np.float32), scaled.astype(np.float32))


def write_projection(projection: Projection, folder: Path) -> None:
    """Write projection.npz, with the same bytes for the same numbers."""
    with zipfile.ZipFile(folder / PROJECTION, "w", zipfile.ZIP_STORED) as archive:
        for name, values in (("mean", projection.mean), ("axes", projection.axes)):
            stream = io.BytesIO()
            np.save(stream, values, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), stream.getvalue())  # its date is fixed: 1980


def read_projection(folder: Path) -> Projection | None:
    """The projection of a package; None of one that was made before there were any.

    Raises:
        TrustError: it is damaged.
    """
    if not (folder / PROJECTION).exists():
        return None
    try:
        with np.load(folder / PROJECTION, allow_pickle=False) as data:
            told: dict[str, Any] = {name: np.asarray(data[name], np.float32) for name in ("mean", "axes")}
        if told["axes"].shape[:1] != told["mean"].shape or not np.isfinite(told["axes"]).all():
            raise ValueError("shapes")
        return Projection(**told)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise TrustError("projection.npz cannot be read.", "Build the package again.") from error
