"""Axial T1 MR slices of the brain, with background, CSF, grey and white matter.

Real: the ICBM152 2009a T1 average of 152 people and its grey and white matter maps, as they ship in the
nilearn wheel (brain only, no skull). Simulated: the subjects, each one smooth deformation of that average
applied to image and maps alike, and the scanners. Every subject is thus one template: scores among them
are optimistic by construction.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.cohorts.cases import Array, Case, acquired_on, between, draw_person, stream

Mask = NDArray[np.uint8]
Points = NDArray[np.float64]

STREAM = "brain-tissue"
SHAPE = (112, 96)
SPACING_MM = 2.0
LICENCE = (
    "ICBM152 2009a: (C) 1993-2009 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological "
    "Institute, McGill University; use, copying, change and distribution for any purpose without fee, with "
    "this notice"
)
SOURCE = "ICBM152 2009a symmetric T1 average and grey and white matter maps, from the nilearn wheel"
SIMULATED = (
    "The anatomy is real but averaged: one MR template of 152 people (ICBM152). Every subject is a simulated "
    "smooth deformation of it, and every scanner is simulated; no image shows one person."
)

LIMITS = (
    "All subjects are one template: scores among them are better than they would be among real people.",
)
REAL_REGIONS = {"grey matter": (2,), "white matter": (3,), "brain": (1, 2, 3)}  # fluid differs there

ORIGIN_MM = (
    -98.0,
    -134.0,
    -72.0,
)  # of the template's first voxel, as are all mm here: right, anterior, superior
CENTRE_MM = (0.0, -17.0, 16.0)  # middle of the brain in template coordinates: right, anterior, superior
WHITE_T1 = 0.87  # of the template's white matter
LEVELS_MM = (-22.0, 46.0)  # axial slices, in template coordinates
KNOTS = 7  # of the elastic field, each way
FIELD_MM = 230.0  # width of the elastic field's grid


@dataclass(frozen=True)
class Acquisition:
    """How a simulated scanner sees: ranges that each image draws from.

    Attributes:
        scanner: name.
        mean_age: of the site's subjects, in years.
        gain: stored units of white matter.
        gamma: contrast exponent.
        blur: standard deviation of the point spread, in pixels.
        bias: coefficients of the polynomial bias field.
        gibbs: share of k-space cut off.
        noise: standard deviation of Rician noise, white matter being about 1.
    """

    scanner: str
    mean_age: float
    gain: tuple[float, float]
    gamma: tuple[float, float]
    blur: tuple[float, float]
    bias: tuple[float, float]
    gibbs: tuple[float, float]
    noise: tuple[float, float]


SITES = {
    "north": Acquisition(
        "Meridian 3T A", 52, (1150, 1350), (0.95, 1.05), (0.3, 0.4), (0.02, 0.08), (0.1, 0.25), (0.02, 0.026)
    ),
    "east": Acquisition(
        "Meridian 3T B", 58, (1000, 1200), (1.00, 1.1), (0.35, 0.45), (0.04, 0.1), (0.15, 0.3), (0.026, 0.032)
    ),
    "south": Acquisition(
        "Aurora 1.5T A", 46, (700, 850), (0.85, 0.95), (0.45, 0.55), (0.02, 0.08), (0.2, 0.35), (0.034, 0.042)
    ),
    "west": Acquisition(
        "Aurora 1.5T B", 61, (800, 950), (1.05, 1.15), (0.4, 0.5), (0.06, 0.12), (0.25, 0.4), (0.04, 0.05)
    ),
    "harbour": Acquisition(
        "Lantern 0.5T", 64, (420, 560), (1.15, 1.35), (0.65, 0.85), (0.12, 0.22), (0.4, 0.55), (0.075, 0.1)
    ),
}
CHANGED_SITE = "east"
CHANGED_SCANNER = Acquisition(
    "Aurora 1.5T C", 58, (700, 850), (1.20, 1.32), (0.60, 0.70), (0.10, 0.18), (0.25, 0.40), (0.044, 0.052)
)


def make_case(seed: int, site: str, subject: int, view: int, profile: Acquisition | None = None) -> Case:
    """One slice of one virtual subject.

    Args:
        seed: of the cohort.
        site: one of SITES.
        subject: number of the subject at its site.
        view: number of the slice of that subject.
        profile: another acquisition than the site's own.

    Returns:
        uint16 pixels (112, 96) at 2 mm, and the mask of tissue classes 0 to 3.
    """
    profile = profile or SITES[site]
    body, rng = stream(seed, STREAM, site, subject), stream(seed, STREAM, site, subject, view)
    person = draw_person(body, profile.mean_age)
    level = np.array([between(rng, LEVELS_MM)])
    tissue, mask = draw_tissue(deform(body, level, SHAPE, SPACING_MM)[:, 0], body)
    stored = acquire(tissue, profile, rng)
    return Case(stored, mask, None, person, acquired_on(person, view), profile.scanner, SPACING_MM)


def draw_tissue(where: Points, body: np.random.Generator, smooth: float = 0.6) -> tuple[Array, Mask]:
    """T1 without a scanner and the tissue classes 0 to 3, at coordinates (3, ...) of the template in mm.

    `smooth` is the standard deviation in mm that the template is smoothed by; the contrast is the subject's.
    """
    t1, grey, white, brain = _sample(where, smooth)
    fluid = np.clip(brain - grey - white, 0, 1)
    mask = np.argmax(np.stack([1 - brain, fluid, grey, white]), axis=0).astype(np.uint8)
    contrast = 1 + np.float32(body.uniform(-0.08, 0.08)) * grey + np.float32(body.uniform(-0.3, 0.2)) * fluid
    return t1 * contrast, mask


@cache
def _template(smooth: float) -> Array:
    """The template at 1 mm (superior, anterior, right, 4): T1, grey and white matter, brain; 0 to about 1.

    Smoothed by so many mm, since it is sampled more coarsely. White matter has a T1 of 1. The order of the
    axes keeps the neighbours in an axial slice together in memory.
    """
    import nibabel
    from scipy.ndimage import gaussian_filter

    spec = find_spec("nilearn")
    folder = Path(str(spec.origin)).parent / "datasets" / "data" if spec else Path()
    files = [folder / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz" for name in ("t1", "gm", "wm")]
    t1, grey, white = (np.asarray(nibabel.load(file).dataobj).astype(np.float32) / 255 for file in files)
    maps = [t1 / np.float32(WHITE_T1), grey, white, (t1 > 0).astype(np.float32)]
    return np.ascontiguousarray(np.stack([gaussian_filter(part, smooth).T for part in maps], axis=-1))


def deform(body: np.random.Generator, levels: NDArray[Any], shape: tuple[int, ...], spacing: float) -> Points:
    """Template coordinates of every pixel of some axial slices of a subject.

    Args:
        body: the subject's stream; draws the same affine and elastic field whatever is sampled.
        levels: of the slices, in mm.
        shape: rows and columns of a slice.
        spacing: of its pixels, in mm.

    Returns:
        float64 (3, levels, rows, columns) in mm: right, anterior, superior.
    """
    angles = body.normal(0, np.radians([2.5, 2.5, 4.0]))
    scales, shears = body.normal(0.97, 0.045, 3), body.normal(0, 0.025, 3)
    knots, matrix = body.normal(0, 11.0, (3, KNOTS, KNOTS, KNOTS)), _affine(angles, scales, shears)
    rows, columns = shape
    anterior = ((rows - 1) / 2 - np.arange(rows)) * spacing  # rows run from anterior to posterior
    right = ((columns - 1) / 2 - np.arange(columns)) * spacing  # columns from right to left
    across, along, up = (_spline(axis) for axis in (right, anterior, levels - CENTRE_MM[2]))
    grid = np.empty((3, len(levels), rows, columns))
    for number, level in enumerate(levels - CENTRE_MM[2]):
        plane = np.empty((3, rows, columns))
        plane[0], plane[1], plane[2] = right[None, :], anterior[:, None], level
        turned = (matrix @ plane.reshape(3, -1)).reshape(plane.shape)
        shift = along @ (knots @ up[number]).transpose(0, 2, 1) @ across.T
        grid[:, number] = turned + shift + np.array(CENTRE_MM)[:, None, None]
    return grid


def _spline(position: NDArray[Any]) -> NDArray[Any]:
    """Weights (n, KNOTS) of the cubic B-splines at positions in mm from the middle of the field."""
    place = (position / FIELD_MM + 0.5) * (KNOTS - 3) + 1
    far = np.abs(place[:, None] - np.arange(KNOTS))
    near = (4 - 6 * far**2 + 3 * far**3) / 6
    return np.asarray(np.where(far < 1, near, np.clip(2 - far, 0, None) ** 3 / 6))


def _affine(angles: NDArray[Any], scales: NDArray[Any], shears: NDArray[Any]) -> NDArray[Any]:
    """Rotation about each axis (radians), times shear, times scale: 3 by 3."""
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    shear = np.eye(3)
    shear[np.triu_indices(3, 1)] = shears
    return np.asarray(matrix @ shear @ np.diag(scales))


def _sample(where: Points, smooth: float) -> Array:
    """The template's four maps at coordinates (3, ...) in mm, linearly between voxels: (4, ...).

    All four at once; eight corners, each one gather, are three times as fast as map_coordinates.
    """
    volume = _template(smooth)
    size = np.array(volume.shape[:3])[:, None]
    voxels = (where.reshape(3, -1) - np.array(ORIGIN_MM)[:, None])[::-1]
    voxels = np.clip(voxels, 0, size - 1.001)
    low = voxels.astype(np.int64)
    share = (voxels - low).astype(np.float32)
    strides = np.array([size[1, 0] * size[2, 0], size[2, 0], 1])
    first, flat = strides @ low, volume.reshape(-1, volume.shape[3])
    total = np.zeros((voxels.shape[1], volume.shape[3]), np.float32)
    for corner in np.ndindex(2, 2, 2):
        weight = np.prod([s if c else 1 - s for c, s in zip(corner, share, strict=True)], axis=0)
        total += weight[:, None] * flat.take(first + int(strides @ corner), axis=0)
    return np.ascontiguousarray(total.T).reshape(-1, *where.shape[1:])


def acquire(tissue: Array, profile: Acquisition, rng: np.random.Generator) -> NDArray[np.uint16]:
    """What the scanner makes of the tissue: contrast, blur, bias field, Gibbs ringing, Rician noise, gain.

    Args:
        tissue: float32 ([depth,] rows, columns), white matter being about 1.
        profile: the scanner.
        rng: the view's stream.

    Returns:
        stored pixels of the same shape, 0 to 4095.
    """
    import torch
    from monai.transforms import (
        RandAdjustContrast,
        RandBiasField,
        RandGaussianSmooth,
        RandGibbsNoise,
        RandRicianNoise,
    )

    chain: list[Any] = [
        RandAdjustContrast(prob=1, gamma=profile.gamma),
        RandGaussianSmooth(prob=1, sigma_x=profile.blur, sigma_y=profile.blur, sigma_z=profile.blur),
        RandBiasField(prob=1, degree=3, coeff_range=profile.bias),
        RandGibbsNoise(prob=1, alpha=profile.gibbs),
        RandRicianNoise(prob=1, std=between(rng, profile.noise), sample_std=False),
    ]
    image = torch.from_numpy(tissue[None])
    with _plain_torch():
        for transform in chain:
            image = transform.set_random_state(seed=int(rng.integers(2**32)))(image)
    pixels = np.asarray(image[0], dtype=np.float32) * np.float32(between(rng, profile.gain))
    return np.asarray(np.clip(np.rint(pixels), 0, 4095), dtype=np.uint16)


@contextlib.contextmanager
def _plain_torch() -> Iterator[None]:
    """One thread, since the order of sums decides the last bit; no metadata, dearer than the pixels."""
    import torch
    from monai.data import get_track_meta, set_track_meta

    threads, track = torch.get_num_threads(), get_track_meta()
    torch.set_num_threads(1)
    set_track_meta(False)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        set_track_meta(track)


def read_real() -> tuple[str, list[Any]]:
    """One sentence on the real person that there is, and their slices; none where they are not installed."""
    from training.cohorts import colin27  # which is placed in this module's coordinates

    return colin27.describe_colin27(), colin27.read_colin27() if colin27.is_present() else []
