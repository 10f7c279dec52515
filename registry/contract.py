"""What a model promises of itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from imaging.config import Section, explain
from imaging.errors import TrustError, WrongModality, WrongShape
from imaging.image import Image
from imaging.preparation import Preparation
from imaging.vocabulary import Kind, Modality


class Contract(Section):
    """The promise that travels inside the package and is covered by its digest.

    Attributes:
        classes: names of the labels 0, 1, ...
        rows: of every image, exactly.
        columns: of every image, exactly.
        png_offset: added to grey values of a PNG; a CT sent as PNG stores HU + 1024.
        max_batch: most images in one call of an engine.
        temperature: divides logits before the softmax; frozen on internal validation.
        threshold: probability from which a classification is positive; frozen on internal validation.
        tolerance: engine/precision -> largest difference of a probability from the reference engine.
        simulated: what of the training data is not real, in plain words.
        lineage: digests of what the package was made from.
    """

    task: str
    title: str
    kind: Kind
    modality: Modality
    classes: tuple[str, ...]
    rows: int = Field(ge=8, le=4096)
    columns: int = Field(ge=8, le=4096)
    spacing_low_mm: float
    spacing_high_mm: float
    png_offset: float
    max_batch: int
    preparation: Preparation
    temperature: float = Field(gt=0)
    threshold: float = Field(ge=0, le=1)
    tolerance: dict[str, float]
    intended_use: str
    simulated: str
    lineage: dict[str, str]

    def check(self, image: Image) -> None:
        """Refuse an image that the model was not made for.

        Raises:
            WrongModality: the file says another modality.
            WrongShape: other rows or columns, or a spacing outside the range.
        """
        if image.modality not in (None, self.modality):
            raise WrongModality(
                f"The file says Modality={str(image.modality)[:16]}.",
                f"{self.task} reads {self.modality}: send such an image, or ask another task.",
            )
        if image.pixels.shape != (self.rows, self.columns):
            raise WrongShape(
                f"The image has {image.pixels.shape[0]} rows and {image.pixels.shape[1]} columns.",
                f"{self.task} reads {self.rows} x {self.columns} at "
                f"{self.spacing_low_mm:g} to {self.spacing_high_mm:g} mm: resample or crop first.",
            )
        low, high = self.spacing_low_mm, self.spacing_high_mm
        if image.spacing_mm and not all(low <= spacing <= high for spacing in image.spacing_mm):
            raise WrongShape(
                f"The pixels are {image.spacing_mm[0]:.3g} x {image.spacing_mm[1]:.3g} mm.",
                f"{self.task} reads {low:g} to {high:g} mm: resample first.",
            )

    def probabilities(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Calibrated probabilities.

        Args:
            logits: float32 (images, classes) or (images, classes, rows, columns).

        Returns:
            Same shape; sums to 1 over classes.
        """
        scaled = logits / np.float32(self.temperature)
        powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=1, keepdims=True), dtype=np.float32)


def write_contract(contract: Contract, folder: Path) -> None:
    """Write contract.json, keys in a fixed order."""
    (folder / "contract.json").write_text(contract.model_dump_json(indent=1) + "\n")


def read_contract(folder: Path) -> Contract:
    """Read contract.json of a package.

    Raises:
        TrustError: it is missing or not a contract.
    """
    path = folder / "contract.json"
    try:
        return Contract.model_validate_json(path.read_bytes())
    except OSError as error:
        raise TrustError(f"There is no contract at {path}.", "Build the package again.") from error
    except ValidationError as error:
        raise TrustError(f"contract.json: {explain(error, Contract)}.", "Build the package again.") from error
