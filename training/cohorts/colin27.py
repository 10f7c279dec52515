"""Colin27: the averaged T1 scans of one real person, an external subject for models of brain tissue.

Not shipped here: the files of the Debian package mricron-data are read where they lie. Its truth is its own
and called silver: the brain as BET cut it out (ch2bet), split by intensity alone. CSF is what is darkest
there, which is not what the ICBM maps leave over: compare grey matter, white matter and the brain.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.errors import DataError
from training.cohorts.brain_tissue import CENTRE_MM, LEVELS_MM, SHAPE, SPACING_MM

FOLDER = Path("/usr/share/mricron/templates")
T1, BRAIN = "ch2.nii.gz", "ch2bet.nii.gz"
SILVER = "brain by BET, grey and white matter by a Gaussian mixture of intensities; no one drew them"
SMOOTH_MM = 0.6  # before sampling at 2 mm, as brain_tissue does
STEP_MM = 4.0  # between slices


@dataclass(frozen=True)
class RealSlice:
    """One axial slice, as brain_tissue makes them.

    Attributes:
        pixels: uint16 (112, 96), T1 in arbitrary units, brain only; anterior to posterior, right to left.
        mask: uint8 (112, 96), silver truth: background, CSF, grey matter, white matter.
        level_mm: of the slice, in template coordinates.
    """

    pixels: NDArray[np.uint16]
    mask: NDArray[np.uint8]
    level_mm: float


def describe_colin27(folder: Path = FOLDER) -> str:
    """One sentence: whether this real subject is at hand."""
    if is_present(folder):
        return f"Colin27, one real person, was scored as an external subject; its truth is silver: {SILVER}."
    return "Colin27, one real person, was not scored: the Debian package mricron-data is not installed."


def read_colin27(folder: Path = FOLDER) -> list[RealSlice]:
    """Axial slices over the levels that brain_tissue draws, every 4 mm, from the feet up.

    Raises:
        DataError: the files are not there.
    """
    if not is_present(folder):
        raise DataError(f"{folder} has no {T1} and {BRAIN}.", "Install the Debian package mricron-data.")
    import nibabel
    from scipy.ndimage import gaussian_filter, map_coordinates

    whole, cut = (nibabel.load(folder / name) for name in (T1, BRAIN))
    inside = np.asarray(cut.dataobj) > 0
    head = np.asarray(whole.dataobj, dtype=np.float32) * inside
    levels = np.arange(LEVELS_MM[0], LEVELS_MM[1] + 1, STEP_MM)
    where = _grid(levels)
    voxels = np.linalg.inv(whole.affine) @ np.concatenate([where, np.ones((1, where.shape[1]))])
    pixels, brain = (
        map_coordinates(gaussian_filter(part.astype(np.float32), SMOOTH_MM), voxels[:3], order=1)
        for part in (head, inside)
    )
    mask = np.where(brain > 0.5, _split(pixels, pixels[brain > 0.95]), 0).astype(np.uint8)
    stored = np.rint(pixels * 8).astype(np.uint16)  # the eighths that smoothing makes are kept
    planes = zip(stored.reshape(-1, *SHAPE), mask.reshape(-1, *SHAPE), levels, strict=True)
    return [RealSlice(plane, truth, float(level)) for plane, truth, level in planes]


def is_present(folder: Path = FOLDER) -> bool:
    """Whether the files are where the Debian package puts them."""
    return (folder / T1).is_file() and (folder / BRAIN).is_file()


def _grid(levels: NDArray[Any]) -> NDArray[np.float64]:
    """Template coordinates (3, n) in mm, of all pixels of axial slices: right, anterior, superior."""
    rows, columns = SHAPE
    anterior = CENTRE_MM[1] + ((rows - 1) / 2 - np.arange(rows)) * SPACING_MM
    right = CENTRE_MM[0] + ((columns - 1) / 2 - np.arange(columns)) * SPACING_MM
    superior, anterior, right = np.meshgrid(levels, anterior, right, indexing="ij")
    return np.stack([right.ravel(), anterior.ravel(), superior.ravel()])


def _split(values: NDArray[np.float32], sample: NDArray[np.float32]) -> NDArray[np.int64]:
    """1, 2 or 3 for each value: dark, middle or bright part of the mixture that is fitted to a sample."""
    from sklearn.mixture import GaussianMixture

    start = np.percentile(sample, [5, 40, 80])[:, None]
    mixture = GaussianMixture(3, means_init=start, random_state=0).fit(sample[:, None])
    rank = np.argsort(np.argsort(mixture.means_[:, 0])) + 1
    return np.asarray(rank[mixture.predict(values[:, None])])
