"""An image as every department sees it, and a few numbers that tell how it was acquired."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.errors import NotFinite, WrongShape

Pixels = NDArray[np.float32]
LARGEST = 1e30


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
        acquisition: how it was made, by the file's header: words of `ACQUISITION`, short and plain.
    """

    pixels: Pixels
    spacing_mm: tuple[float, float] | None = None
    modality: str | None = None
    subject: str | None = None
    acquisition: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what is not one finite image.

        Raises:
            WrongShape: the array does not have two or three axes, or one of them is empty.
            NotFinite: a pixel is NaN, infinite, or so large that sums of such would be.
        """
        if self.pixels.ndim not in (2, 3) or 0 in self.pixels.shape:
            raise WrongShape(
                f"The image has shape {self.pixels.shape}.",
                "Send rows, columns; or rows, columns, 3 colours; or depth, rows, columns.",
            )
        if not (self.pixels.min() > -LARGEST and self.pixels.max() < LARGEST):  # NaN is neither
            raise NotFinite(
                f"Some pixels are NaN, infinite or beyond {LARGEST:g}.",
                "Write finite numbers before sending.",
            )


ACQUISITION = {
    "make": "Manufacturer", "model": "ManufacturerModelName", "kernel": "ConvolutionKernel", "kvp": "KVP",
    "thickness_mm": "SliceThickness", "field_t": "MagneticFieldStrength", "sequence": "ScanningSequence",
    "contrast_agent": "ContrastBolusAgent",
}  # fmt: skip
STATISTICS = ("background", "median", "bright", "contrast", "noise", "sharpness")
COLOURS = ("red", "blue")
ENOUGH_PIXELS = 2**14


def describe(prepared: NDArray[np.float32]) -> dict[str, float]:
    """Describe a prepared image by a few numbers, of all of it or of lines at even steps where it is large.

    Args:
        prepared: float32 (channels[, depth], rows, columns), at least 3 rows and columns, as `prepare`
            returns it.

    Returns:
        background, median, bright: 5th, 50th and 95th percentile; contrast: standard deviation; noise:
        robust standard deviation of the diagonal second difference (Immerkaer 1996); sharpness: mean
        gradient (central differences) over contrast, per pixel. All in prepared units, over all channels and
        slices. Colour images have red and blue as well: how much more of it there is than green.
    """
    step = max(1, prepared.size // ENOUGH_PIXELS)
    above, here, below = (prepared[..., k : prepared.shape[-2] - 2 + k : step, :] for k in range(3))
    lines = prepared[..., ::step, :]
    background, median, bright = _percentiles(lines.ravel(), (0.05, 0.5, 0.95))
    contrast = float(lines.std())
    bend = above - 2 * here + below
    second = bend[..., 2:] - 2 * bend[..., 1:-1] + bend[..., :-2]  # smooth anatomy cancels, noise does not
    down, right = (below - above)[..., 1:-1], here[..., 2:] - here[..., :-2]
    told = {
        "background": background,
        "median": median,
        "bright": bright,
        "contrast": contrast,
        "noise": float(np.sqrt(np.pi / 2) * np.abs(second).mean() / 6),
        "sharpness": float(np.sqrt(down * down + right * right).mean() / 2 / max(contrast, 1e-6)),
    }
    if len(prepared) == 3:
        red, green, blue = (float(channel.mean()) for channel in lines)
        told |= {"red": red - green, "blue": blue - green}
    return told


def _percentiles(values: NDArray[np.float32], shares: tuple[float, ...]) -> list[float]:
    """numpy.percentile's linear rule, at a fifth of its time."""
    places = [share * (len(values) - 1) for share in shares]
    lower = [int(place) for place in places]
    upper = [min(place + 1, len(values) - 1) for place in lower]
    order = np.partition(values, [*lower, *upper])
    pairs = zip(places, lower, upper, strict=True)
    return [float(order[low] + (order[high] - order[low]) * (place - low)) for place, low, high in pairs]


def show_image(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """What is shown of a prepared image: (rows, columns), or (rows, columns, 3) of 0 to 1."""
    if len(image) == 3:
        return np.clip((np.moveaxis(image, 0, -1) + 1) / 2, 0, 1)
    return np.asarray(middle(image[0]))


def middle(planes: NDArray[Any]) -> NDArray[Any]:
    """The middle slice of a volume, or the plane itself."""
    return planes[len(planes) // 2] if planes.ndim == 3 else planes
