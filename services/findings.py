"""From bytes to a prepared image, from an engine's answer to what the caller reads, and images as files."""

from __future__ import annotations

import base64
import io
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.detection import STRIDE, find_lesions
from imaging.errors import WrongType
from imaging.image import Image, describe
from imaging.preparation import prepare
from imaging.reading import decode
from imaging.vocabulary import ContentType, Kind
from monitoring.reference import summarise
from registry.engines import Answers
from registry.package import Contract

NOTICE = "research use only"


@dataclass(frozen=True)
class Taken:
    """A request's image, checked against the contract; prepared: (channels[, depth], rows, columns)."""

    image: Image
    prepared: NDArray[np.float32]


@dataclass(frozen=True)
class Found:
    """What the caller gets (`answer`), and what the journal keeps (`columns`)."""

    answer: dict[str, Any]
    columns: dict[str, float]


def take(body: bytes, content_type: str, contract: Contract) -> Taken:
    """Decode, check and prepare one image.

    Raises:
        ImageError: it cannot be read, or the model was not made for it.
    """
    image = decode(body, content_type, contract.png_offset)
    contract.check(image)
    return Taken(image, prepare(image.pixels, contract.preparation))


def find(taken: Taken, answers: Answers, contract: Contract) -> Found:
    """Read an engine's answer to one image at the contract's operating point.

    Args:
        taken: the image.
        answers: of a batch of one.
        contract: of the package that answered.
    """
    probabilities = contract.probabilities(answers.logits)[0]
    columns = {**describe(taken.prepared), **summarise(contract, probabilities)}
    if contract.kind is Kind.CLASSIFICATION:
        answer = _classify(probabilities, contract)
    elif contract.kind is Kind.DETECTION:
        answer = _detect(answers.logits[0], contract)
    else:
        answer = _segment(probabilities, taken.image, contract)
    return Found({**answer, "uncertainty": columns["uncertainty"]}, columns)


def draw_heat(answers: Answers) -> dict[str, Any]:
    """The heat map of a batch of one, 0 to 255 of its largest value, as a PNG (of a volume: as .npy)."""
    heat = answers.heat[0]
    return _encode(np.rint(255 * heat / max(float(heat.max()), 1e-12)).astype(np.uint8))


def _classify(probabilities: NDArray[np.float32], contract: Contract) -> dict[str, Any]:
    named = {name: float(p) for name, p in zip(contract.classes, probabilities, strict=True)}
    positive = bool(contract.score(probabilities[None])[0] >= contract.threshold)
    return {"probabilities": named, "positive": positive, "threshold": contract.threshold}


def _detect(logits: NDArray[np.float32], contract: Contract) -> dict[str, Any]:
    """Centres and boxes of the lesions at or above the threshold, most certain first, in pixels."""
    found = find_lesions(logits, STRIDE, contract.temperature)
    shown = [
        {name: round(float(value), 4) for name, value in asdict(lesion).items()}
        for lesion in found
        if lesion.score >= contract.threshold
    ]
    probability = float(contract.score(contract.probabilities(logits[None]))[0])
    return {"lesions": shown, "probability": probability, "positive": bool(shown),
            "threshold": contract.threshold}  # fmt: skip


def _segment(probabilities: NDArray[np.float32], image: Image, contract: Contract) -> dict[str, Any]:
    labels = probabilities.argmax(axis=0)
    pixels = {name: int((labels == label).sum()) for label, name in enumerate(contract.classes) if label}
    named = {str(label): name for label, name in enumerate(contract.classes)}
    told: dict[str, Any] = {"mask": {**_encode(labels.astype(np.uint8)), "labels": named}, "area_px": pixels}
    if image.spacing_mm and labels.ndim == 2:
        size = image.spacing_mm[0] * image.spacing_mm[1]
        told["area_mm2"] = {name: round(count * size, 2) for name, count in pixels.items()}
    return told


def _encode(values: NDArray[np.uint8]) -> dict[str, str]:
    kind = ContentType.PNG if values.ndim == 2 else ContentType.NPY
    body = mask_png(values) if values.ndim == 2 else encode(values, kind, 1.0, "")
    return {"encoding": f"{kind};base64", "data": base64.b64encode(body).decode()}


def encode(
    pixels: NDArray[Any], kind: str, spacing_mm: float, modality: str, png_offset: float = 0.0
) -> bytes:
    """Write one image.

    Args:
        pixels: (rows, columns), integers within int16 or uint16; (rows, columns, 3) of uint8 as NPY or PNG;
            (depth, rows, columns) as NPY or NIfTI.
        kind: a content type.
        spacing_mm: between pixel centres, both ways.
        modality: MR or CT, for DICOM.
        png_offset: as in the contract; a CT PNG stores HU - offset.

    Raises:
        WrongType: not one of the four content types.
    """
    if kind == ContentType.NPY:
        stream = io.BytesIO()
        np.save(stream, pixels, allow_pickle=False)
        return stream.getvalue()
    if kind == ContentType.PNG:
        return _png(pixels, png_offset)
    if kind == ContentType.NIFTI:
        return _nifti(pixels, spacing_mm)
    if kind == ContentType.DICOM:
        return _dicom(pixels, spacing_mm, modality)
    raise WrongType(f"Content type {kind!r} cannot be written.", f"Use {', '.join(ContentType)}.")


def lossless_types(pixels: NDArray[Any]) -> tuple[ContentType, ...]:
    """The content types that carry a slice, a colour image or a volume unchanged."""
    if pixels.ndim == 3:
        return (ContentType.NPY, ContentType.PNG if pixels.shape[-1] == 3 else ContentType.NIFTI)
    return (ContentType.DICOM, ContentType.NIFTI, ContentType.NPY, ContentType.PNG)


def mask_png(labels: NDArray[np.integer]) -> bytes:
    """Labels 0 to 255 as an 8 bit greyscale PNG."""
    from PIL import Image as Pillow

    stream = io.BytesIO()
    Pillow.fromarray(labels.astype(np.uint8)).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def _png(pixels: NDArray[Any], offset: float) -> bytes:
    from PIL import Image as Pillow

    stream = io.BytesIO()
    stored = pixels if pixels.ndim == 3 else (pixels.astype(np.int32) - int(offset)).astype(np.uint16)
    Pillow.fromarray(stored).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def _nifti(pixels: NDArray[Any], spacing_mm: float) -> bytes:
    """Axes i to the right, j to anterior and k up, as most tools write it."""
    import nibabel as nib

    affine = np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0])
    turned = pixels.reshape((-1, *pixels.shape[-2:])).T[::-1, ::-1]
    volume: bytes = nib.Nifti1Image(np.ascontiguousarray(turned), affine).to_bytes()
    return volume


def _dicom(pixels: NDArray[Any], spacing_mm: float, modality: str) -> bytes:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage if modality == "CT" else MRImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(prefix="2.25.")
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = Dataset()
    data.file_meta = meta
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.Modality = modality
    data.Rows, data.Columns = pixels.shape
    data.PixelSpacing = [spacing_mm, spacing_mm]
    data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit, data.PixelRepresentation = 15, int(pixels.dtype.kind == "i")
    data.RescaleSlope, data.RescaleIntercept = 1, 0
    data.PixelData = pixels.astype(np.int16 if pixels.dtype.kind == "i" else np.uint16).tobytes()
    stream = io.BytesIO()
    data.save_as(stream, enforce_file_format=True)
    return stream.getvalue()
