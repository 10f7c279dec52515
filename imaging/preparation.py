"""The one way an image becomes a network's input, in training, serving and the MLflow face alike.

This file is shipped beside every MLflow version as it stands, so it imports numpy and pydantic only.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field


class Window(BaseModel):
    """A fixed window of physical units, for CT.

    Attributes:
        low_hu: becomes -1.
        high_hu: becomes +1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["window"] = "window"
    low_hu: float
    high_hu: float


class Percentiles(BaseModel):
    """A window that each image sets itself, for MR, whose units are arbitrary.

    Attributes:
        low: percentile (0 to 100) that becomes -1.
        high: percentile (0 to 100) that becomes +1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["percentiles"] = "percentiles"
    low: float = Field(ge=0, le=100)
    high: float = Field(ge=0, le=100)


class Colour(BaseModel):
    """8 bit red, green and blue: 0 becomes -1 and 255 becomes +1."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["colour"] = "colour"


Preparation = Annotated[Window | Percentiles | Colour, Field(discriminator="kind")]


def prepare(pixels: NDArray[np.float32], preparation: Window | Percentiles | Colour) -> NDArray[np.float32]:
    """Scale pixels to about -1 to 1, channels first.

    Args:
        pixels: float32, finite: a plane (rows, columns), a colour plane (rows, columns, 3) of 0 to 255, or a
            volume (depth, rows, columns).
        preparation: how; read from the contract wherever a model is served.

    Returns:
        float32 (1, rows, columns), (3, rows, columns) or (1, depth, rows, columns), clipped to -1..1 (window
        and colour) or -1.5..1.5 (percentiles).
    """
    if isinstance(preparation, Colour):
        low, high, limit = 0.0, 255.0, 1.0
        pixels = np.moveaxis(pixels, -1, 0)
    elif isinstance(preparation, Window):
        low, high, limit = preparation.low_hu, preparation.high_hu, 1.0
    else:
        low, high = (float(v) for v in np.percentile(pixels, [preparation.low, preparation.high]))
        limit = 1.5
    planes = np.empty(pixels.shape, np.float32)
    np.subtract(pixels, np.float32(low), out=planes)
    planes *= np.float32(2 / max(high - low, 1e-6))
    planes -= np.float32(1)
    np.clip(planes, -limit, limit, out=planes)
    return planes if isinstance(preparation, Colour) else planes[None]
