"""The folder that is a model version, and the contract in it: what the model promises of itself."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from imaging.config import explain
from imaging.errors import TrustError, WrongModality, WrongShape
from imaging.image import Image
from imaging.manifest import digest_file
from imaging.preparation import Preparation
from imaging.recipe import Section
from imaging.vocabulary import Kind, Modality

PROGRAM = "program.pt2"  # what an import of ONNX does not have
PROJECTION = "projection.npz"  # what a package from before surveillance does not have
FILES = (
    "contract.json",
    "weights.safetensors",
    "model.onnx",
    PROGRAM,
    "golden.npz",
    "reference.parquet",
    PROJECTION,
)


@dataclass(frozen=True)
class Golden:
    """Cases whose answers are known.

    Attributes:
        images: float32 (n, 1, rows, columns), prepared.
        logits: float32 (n, classes[, rows, columns]), of the reference engine (torch, f32).
    """

    images: NDArray[np.float32]
    logits: NDArray[np.float32]


def digest_files(folder: Path) -> dict[str, str]:
    """sha256 of each file of a package.

    Raises:
        TrustError: a file is missing, is a link, or does not belong there.
    """
    if not folder.is_dir():
        raise TrustError(f"There is no package at {folder}.", "Run `dvc repro`, or restore var/packages.")
    found = {path.name for path in folder.iterdir()}
    if found | {PROGRAM, PROJECTION} != set(FILES):
        raise TrustError(
            f"The package {folder.name} has missing or added files: {sorted(found ^ set(FILES))}.",
            f"A package has exactly {', '.join(FILES)}; one that came as ONNX has no {PROGRAM}, an old one "
            f"no {PROJECTION}.",
        )
    if any(not (folder / name).is_file() or (folder / name).is_symlink() for name in found):
        raise TrustError(f"The package {folder.name} holds a link or a folder.", "Copy the files themselves.")
    return {name: digest_file(folder / name) for name in FILES if name in found}


def digest_package(folder: Path) -> str:
    """Name of a package: `sha256:` and the sha256 over its files' names and digests.

    Raises:
        TrustError: as `digest_files`.
    """
    return combine_digests(digest_files(folder))


def combine_digests(files: dict[str, str]) -> str:
    """Package digest from the digests of its files."""
    lines = "".join(f"{files[name]}  {name}\n" for name in sorted(files))
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def read_golden(folder: Path) -> Golden:
    """Read golden.npz of a package.

    Raises:
        TrustError: it is damaged.
    """
    try:
        with np.load(folder / "golden.npz", allow_pickle=False) as data:
            return Golden(images=data["images"], logits=data["logits"])
    except (OSError, ValueError, KeyError) as error:
        raise TrustError("golden.npz cannot be read.", "Build the package again.") from error


def shelf(var: Path, digest: str) -> Path:
    """Where a package of this digest is kept."""
    return var / "packages" / digest.removeprefix("sha256:")


def statements_folder(package: Path) -> Path:
    """Where the signed statements about a package are kept: beside it, never in it."""
    return package.with_name(package.name + ".statements")


def shelve(source: Path, var: Path) -> Path:
    """Copy a package to its shelf; whole or not at all, and nothing is overwritten.

    Returns:
        The folder under var/packages.

    Raises:
        TrustError: what lies on the shelf under this digest is something else.
    """
    digest = digest_package(source)
    target = shelf(var, digest)
    if target.exists():
        if digest_package(target) != digest:
            raise TrustError(
                f"{target} was changed after it was shelved.", f"Remove it and register again: rm -r {target}"
            )
        return target
    draft = target.with_name(target.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(source, draft)
    draft.rename(target)
    return target


class Contract(Section):
    """The promise that travels inside the package and is covered by its digest.

    Attributes:
        classes: names of the labels 0, 1, ...
        positive: the classes that count as positive at the operating point.
        channels: 1 (grey) or 3 (red, green, blue).
        depth: slices of every volume, exactly; 0 for a plane.
        rows: of every image, exactly.
        columns: of every image, exactly.
        png_offset: added to grey values of a PNG; a CT sent as PNG stores HU + 1024.
        max_batch: most images in one call of an engine.
        temperature: divides logits before the softmax; frozen on internal validation.
        threshold: probability from which a classification is positive; frozen on internal validation.
        tolerance: engine/precision -> largest difference of a probability from the reference engine.
        simulated: what of the training data is not real, in plain words.
        limits: what the data could not show, in sentences that every report repeats.
        lineage: digests of what the package was made from.
    """

    task: str
    title: str
    kind: Kind
    modality: Modality
    classes: tuple[str, ...]
    positive: tuple[str, ...]
    channels: Literal[1, 3]
    depth: int = Field(ge=0, le=512)
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
    limits: tuple[str, ...]
    lineage: dict[str, str]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a prepared image: (channels, rows, columns) or (1, depth, rows, columns)."""
        return (self.channels, *self.spatial)

    @property
    def spatial(self) -> tuple[int, ...]:
        """(rows, columns) or (depth, rows, columns): of a mask and of a heat map."""
        return (self.depth, self.rows, self.columns) if self.depth else (self.rows, self.columns)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of an image as it is sent: colours come last."""
        return (*self.spatial, 3) if self.channels == 3 else self.spatial

    @property
    def positive_labels(self) -> tuple[int, ...]:
        """Numbers of the positive classes."""
        return tuple(label for label, name in enumerate(self.classes) if name in self.positive)

    def check(self, image: Image) -> None:
        """Refuse an image that the model was not made for.

        Raises:
            WrongModality: the file says another modality.
            WrongShape: another shape, colours that are no bytes, or a spacing outside the range.
        """
        if image.pixels.shape != self.stored_shape:
            raise WrongShape(
                f"The image has shape {image.pixels.shape}.",
                f"{self.task} reads {self._in_words()} at "
                f"{self.spacing_low_mm:g} to {self.spacing_high_mm:g} mm: resample or crop first.",
            )
        if self.channels == 3 and not _are_bytes(image.pixels):
            raise WrongShape("The colours are no whole numbers of 0 to 255.", "Send 8 bit RGB.")
        self.check_source(image)

    def check_source(self, image: Image) -> None:
        """Refuse an image of another kind or scale, whatever its shape.

        Raises:
            WrongModality: the file says another modality.
            WrongShape: a spacing outside the range.
        """
        if image.modality not in (None, self.modality):
            raise WrongModality(
                f"The file says Modality={str(image.modality)[:16]}.",
                f"{self.task} reads {self.modality}: send such an image, or ask another task.",
            )
        low, high = self.spacing_low_mm, self.spacing_high_mm
        if image.spacing_mm and not all(low <= spacing <= high for spacing in image.spacing_mm):
            raise WrongShape(
                f"The pixels are {image.spacing_mm[0]:.3g} x {image.spacing_mm[1]:.3g} mm.",
                f"{self.task} reads {low:g} to {high:g} mm: resample first.",
            )

    def _in_words(self) -> str:
        kind = "colour pixels" if self.channels == 3 else "grey pixels"
        return f"{' x '.join(map(str, self.spatial))} {kind}"

    def probabilities(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Calibrated probabilities.

        Args:
            logits: float32 (images, classes[[, depth], rows, columns]); of a detector (images, 3, rows / 4,
                columns / 4).

        Returns:
            Same shape, sums to 1 over classes; of a detector (images, 1, rows / 4, columns / 4): that a
            lesion has its centre there.
        """
        scaled = logits / np.float32(self.temperature)
        if self.kind is Kind.DETECTION:
            return np.asarray(1 / (1 + np.exp(-scaled[:, :1])), dtype=np.float32)
        powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=1, keepdims=True), dtype=np.float32)

    def score(self, probabilities: NDArray[np.float32]) -> NDArray[np.float32]:
        """What is held against the threshold: (images,), 0 to 1.

        Args:
            probabilities: of a classification or a detection, as `probabilities` returns them.
        """
        if self.kind is Kind.DETECTION:
            return np.asarray(probabilities.max(axis=(1, 2, 3)))
        return np.asarray(probabilities[:, list(self.positive_labels)].sum(axis=1))


def _are_bytes(pixels: NDArray[np.float32]) -> bool:
    with np.errstate(invalid="ignore"):  # what does not fit comes out as another number
        return bool((pixels == pixels.astype(np.uint8)).all())


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
