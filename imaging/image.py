"""An image as every department sees it, and a few numbers that tell how it was acquired."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.errors import NotFinite, WrongShape

Pixels = NDArray[np.float32]


@dataclass(frozen=True)
class Image:
    """One slice, colour photograph or volume.

    Attributes:
        pixels: float32, finite: (rows, columns), (rows, columns, 3) of 0 to 255, or (depth, rows, columns).
            Of axial slices rows run from anterior to posterior and columns from the patient's right to left,
            as on a radiologist's screen, and depth from the feet up. CT in HU; MR in arbitrary units.
        spacing_mm: (row, column) distance of pixel centres in mm, or None when the file does not say.
        modality: DICOM's word for the machine, or None when the file does not say.
        subject: the file's own patient number, or None. Never stored or logged in the clear.
    """

    pixels: Pixels
    spacing_mm: tuple[float, float] | None = None
    modality: str | None = None
    subject: str | None = None

    def __post_init__(self) -> None:
        """Refuse what is not one finite image.

        Raises:
            WrongShape: the array does not have two or three axes, or one of them is empty.
            NotFinite: a pixel is NaN or infinite.
        """
        if self.pixels.ndim not in (2, 3) or 0 in self.pixels.shape:
            raise WrongShape(
                f"The image has shape {self.pixels.shape}.",
                "Send rows, columns; or rows, columns, 3 colours; or depth, rows, columns.",
            )
        if not np.isfinite(self.pixels).all():
            raise NotFinite(
                "Some pixels are NaN or infinite.", "Write finite numbers before sending the image."
            )


STATISTICS = ("background", "median", "bright", "contrast", "noise", "sharpness")
COLOURS = ("red", "blue")


def describe(prepared: NDArray[np.float32]) -> dict[str, float]:
    """Describe a prepared image by a few numbers.

    Args:
        prepared: float32 (channels[, depth], rows, columns), as `prepare` returns it.

    Returns:
        background, median, bright: 5th, 50th and 95th percentile; contrast: standard deviation; noise:
        robust standard deviation of the diagonal second difference (Immerkaer 1996); sharpness: mean
        gradient over contrast, per pixel. All in prepared units, over all channels and slices. Colour images
        have red and blue as well: how much more of it there is than green.
    """
    pixels = prepared.astype(np.float64)
    background, median, bright = (float(v) for v in np.percentile(pixels, [5, 50, 95]))
    contrast = float(pixels.std())
    second = np.diff(np.diff(pixels, 2, axis=-2), 2, axis=-1)  # smooth anatomy cancels, noise does not
    rows, columns = np.gradient(pixels, axis=(-2, -1))
    told = {
        "background": background,
        "median": median,
        "bright": bright,
        "contrast": contrast,
        "noise": float(np.sqrt(np.pi / 2) * np.abs(second).mean() / 6),
        "sharpness": float(np.hypot(rows, columns).mean() / max(contrast, 1e-6)),
    }
    if len(pixels) == 3:
        red, green, blue = (float(channel.mean()) for channel in pixels)
        told |= {"red": red - green, "blue": blue - green}
    return told


def show_image(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """What is shown of a prepared image: (rows, columns), or (rows, columns, 3) of 0 to 1."""
    if len(image) == 3:
        return np.clip((np.moveaxis(image, 0, -1) + 1) / 2, 0, 1)
    return np.asarray(middle(image[0]))


def middle(planes: NDArray[Any]) -> NDArray[Any]:
    """The middle slice of a volume, or the plane itself."""
    return planes[len(planes) // 2] if planes.ndim == 3 else planes
