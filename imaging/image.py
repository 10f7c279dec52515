"""An image as every department sees it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from imaging.errors import NotFinite, WrongShape

Pixels = NDArray[np.float32]


@dataclass(frozen=True)
class Image:
    """One slice.

    Attributes:
        pixels: float32 (rows, columns), finite. Rows run from anterior to posterior and columns from the
            patient's right to left, as on a radiologist's screen. CT in HU; MR in arbitrary units.
        spacing_mm: (row, column) distance of pixel centres in mm, or None when the file does not say.
        modality: DICOM's word for the machine, or None when the file does not say.
        subject: the file's own patient number, or None. Never stored or logged in the clear.
    """

    pixels: Pixels
    spacing_mm: tuple[float, float] | None = None
    modality: str | None = None
    subject: str | None = None

    def __post_init__(self) -> None:
        """Refuse what is not one finite slice.

        Raises:
            WrongShape: the array does not have two axes, or one of them is empty.
            NotFinite: a pixel is NaN or infinite.
        """
        if self.pixels.ndim != 2 or 0 in self.pixels.shape:
            raise WrongShape(
                f"The image has shape {self.pixels.shape}.", "Send one slice with two axes: rows, columns."
            )
        if not np.isfinite(self.pixels).all():
            raise NotFinite(
                "Some pixels are NaN or infinite.", "Write finite numbers before sending the image."
            )
