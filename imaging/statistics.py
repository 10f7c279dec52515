"""A few numbers that tell how an image was acquired, whatever it shows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

STATISTICS = ("background", "median", "bright", "contrast", "noise", "sharpness")


def describe(prepared: NDArray[np.float32]) -> dict[str, float]:
    """Describe a prepared image by six numbers.

    Args:
        prepared: float32 (1, rows, columns), as `prepare` returns it.

    Returns:
        background, median, bright: 5th, 50th and 95th percentile; contrast: standard deviation; noise:
        robust standard deviation of the diagonal second difference (Immerkaer 1996); sharpness: mean
        gradient over contrast, per pixel. All in prepared units.
    """
    pixels = prepared[0].astype(np.float64)
    background, median, bright = (float(v) for v in np.percentile(pixels, [5, 50, 95]))
    contrast = float(pixels.std())
    second = np.diff(np.diff(pixels, 2, axis=0), 2, axis=1)  # smooth anatomy cancels, noise does not
    rows, columns = np.gradient(pixels)
    return {
        "background": background,
        "median": median,
        "bright": bright,
        "contrast": contrast,
        "noise": float(np.sqrt(np.pi / 2) * np.abs(second).mean() / 6),
        "sharpness": float(np.hypot(rows, columns).mean() / max(contrast, 1e-6)),
    }
