"""From bytes to a prepared image, from an engine's answer to what the caller reads, and images as files."""

from __future__ import annotations

import base64
import hashlib
import io
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from imaging.detection import STRIDE, find_lesions
from imaging.errors import NotAcceptable, WrongType
from imaging.image import Image, describe
from imaging.preparation import prepare
from imaging.reading import decode
from imaging.vocabulary import ContentType, Kind
from monitoring.reference import summarise
from registry.engines import Answers
from registry.package import Contract
from registry.profiles import SMALLEST, SiteProfile
from registry.projection import Projection

NOTICE = "research use only"


@dataclass(frozen=True)
class Taken:
    """A request's image, checked against the contract; prepared: (channels[, depth], rows, columns)."""

    image: Image
    prepared: NDArray[np.float32]


@dataclass(frozen=True)
class Found:
    """What an answer is made of.

    Attributes:
        answer: what the caller gets, without the mask.
        columns: what the journal keeps.
        labels: the mask of a segmentation, uint8 ([depth,] rows, columns).
        names: of the labels 0, 1, ...
    """

    answer: dict[str, Any]
    columns: dict[str, float]
    labels: NDArray[np.uint8] | None = None
    names: tuple[str, ...] = ()

    def digest(self) -> str:
        """sha256 of the answer and the mask: a replay must give the same."""
        told = hashlib.sha256(orjson.dumps(self.answer, option=orjson.OPT_SORT_KEYS))
        if self.labels is not None:
            told.update(self.labels.tobytes())
        return told.hexdigest()

    @property
    def positive(self) -> bool | None:
        """At the operating point, also where the answer abstains; None of a segmentation."""
        if self.answer.get("abstained"):
            return bool(self.columns["probability"] >= self.answer["threshold"])
        return self.answer.get("positive")

    def show(self, form: str = "") -> dict[str, Any]:
        """The answer with its mask in base64, as PNG (of a volume .npy), or as runs where form is `rle`."""
        if self.labels is None:
            return self.answer
        mask = _runs(self.labels) if form == "rle" else _encode(self.labels)
        return {
            **self.answer,
            "mask": {**mask, "labels": {str(label): name for label, name in enumerate(self.names)}},
        }


def take(body: bytes, content_type: str, contract: Contract) -> Taken:
    """Decode, check and prepare one image.

    Raises:
        ImageError: it cannot be read, or the model was not made for it.
    """
    image = decode(body, content_type, contract.png_offset)
    contract.check(image)
    return Taken(image, prepare(image.pixels, contract.preparation))


def find(
    taken: Taken, answers: Answers, contract: Contract, projection: Projection | None = None,
    profile: SiteProfile | None = None,
) -> Found:  # fmt: skip
    """Read an engine's answer to one image at the contract's operating point, or the site's.

    Args:
        taken: the image.
        answers: of a batch of one.
        contract: of the package that answered.
        projection: of its embeddings; None leaves e0, e1, ... out of the columns.
        profile: what the site's answers follow instead of the contract; a segmentation has none.
    """
    probabilities = contract.probabilities(answers.logits)[0]
    columns = {**describe(taken.prepared), **summarise(contract, probabilities)}
    if projection:
        columns |= projection.apply(answers.embedding[0])
    if taken.image.spacing_mm:
        columns["spacing_mm"] = float(taken.image.spacing_mm[0])
    unsure = {"uncertainty": columns["uncertainty"]}
    if contract.kind is Kind.SEGMENTATION:
        labels = probabilities.argmax(axis=0).astype(np.uint8)
        return Found({**_measure(labels, taken.image, contract), **unsure}, columns, labels, contract.classes)
    if contract.kind is Kind.CLASSIFICATION:
        answer = _classify(probabilities, columns["probability"], contract, profile)
    else:
        answer = _detect(answers.logits[0], contract, profile)
    if profile:
        positive = answer["positive"]
        columns |= profile.note(columns["probability"], positive)
        answer |= profile.tell(columns["probability"], positive)
    return Found({**answer, **unsure}, columns)


def _threshold(contract: Contract, profile: SiteProfile | None) -> float:
    return contract.threshold if profile is None or profile.threshold is None else profile.threshold


def draw_heat(answers: Answers) -> dict[str, Any]:
    """The heat map of a batch of one, 0 to 255 of its largest value, as a PNG (of a volume: as .npy)."""
    heat = answers.heat[0]
    return _encode(np.rint(255 * heat / max(float(heat.max()), 1e-12)).astype(np.uint8))


def _classify(
    probabilities: NDArray[np.float32], score: float, contract: Contract, profile: SiteProfile | None
) -> dict[str, Any]:
    shares = probabilities.tolist()
    if profile and (site := float(profile.recalibrate(score))) != score:
        grown = site / max(score, SMALLEST), (1 - site) / max(1 - score, SMALLEST)
        shares = [share * grown[label not in contract.positive_labels] for label, share in enumerate(shares)]
        score = site
    named, threshold = dict(zip(contract.classes, shares, strict=True)), _threshold(contract, profile)
    return {"probabilities": named, "positive": score >= threshold, "threshold": threshold}


def _detect(logits: NDArray[np.float32], contract: Contract, profile: SiteProfile | None) -> dict[str, Any]:
    """Centres and boxes of the lesions at or above the threshold, most certain first, in pixels."""
    found, threshold = find_lesions(logits, STRIDE, contract.temperature), _threshold(contract, profile)
    probability = float(contract.score(contract.probabilities(logits[None]))[0])
    if profile:
        found = [replace(one, score=float(profile.recalibrate(one.score))) for one in found]
        probability = float(profile.recalibrate(probability))
    shown = [
        {name: round(float(value), 4) for name, value in asdict(lesion).items()}
        for lesion in found
        if lesion.score >= threshold
    ]
    return {"lesions": shown, "probability": probability, "positive": bool(shown),
            "threshold": threshold}  # fmt: skip


def _measure(labels: NDArray[np.uint8], image: Image, contract: Contract) -> dict[str, Any]:
    counts = np.bincount(labels.ravel(), minlength=len(contract.classes)).tolist()
    pixels = dict(zip(contract.classes[1:], counts[1:], strict=True))
    told: dict[str, Any] = {"area_px": pixels}
    if image.spacing_mm and labels.ndim == 2:
        size = image.spacing_mm[0] * image.spacing_mm[1]
        told["area_mm2"] = {name: round(count * size, 2) for name, count in pixels.items()}
    return told


def _runs(labels: NDArray[np.uint8]) -> dict[str, Any]:
    """Run lengths in row-major order: (label, pixels), (label, pixels), ..."""
    flat = labels.ravel()
    starts = np.flatnonzero(np.diff(flat, prepend=flat[0] + 1))
    lengths = np.diff(starts, append=len(flat))
    runs = np.stack([flat[starts], lengths], axis=1).tolist()
    return {"encoding": "rle", "shape": list(labels.shape), "runs": runs}


def write_mask(labels: NDArray[np.uint8], form: str, spacing_mm: tuple[float, float] | None) -> bytes:
    """A mask as a file: `png` (a plane) or `nifti`, in which a slice is 1 mm thick.

    Raises:
        NotAcceptable: a volume as PNG.
    """
    if form == "nifti":
        return _nifti(labels, spacing_mm or (1.0, 1.0))
    if labels.ndim != 2:
        raise NotAcceptable("The mask of a volume is no PNG.", "Accept application/x-nifti or JSON.")
    return mask_png(labels)


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
        return _nifti(pixels, (spacing_mm, spacing_mm), spacing_mm)
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


def _nifti(pixels: NDArray[Any], spacing_mm: tuple[float, float], thick_mm: float = 1.0) -> bytes:
    """Axes i to the right, j to anterior and k up, as most tools write it."""
    import nibabel as nib

    affine = np.diag([spacing_mm[1], spacing_mm[0], thick_mm, 1.0])
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
