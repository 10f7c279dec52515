"""One slice as the files that hospitals send: the inverse of imaging.reading."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.errors import WrongType
from imaging.vocabulary import ContentType


def encode(
    pixels: NDArray[Any], kind: str, spacing_mm: float, modality: str, png_offset: float = 0.0
) -> bytes:
    """Write one slice.

    Args:
        pixels: (rows, columns), integers within int16 or uint16.
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


def mask_png(labels: NDArray[np.integer]) -> bytes:
    """Labels 0 to 255 as an 8 bit greyscale PNG."""
    from PIL import Image as Pillow

    stream = io.BytesIO()
    Pillow.fromarray(labels.astype(np.uint8)).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def _png(pixels: NDArray[Any], offset: float) -> bytes:
    from PIL import Image as Pillow

    stream = io.BytesIO()
    Pillow.fromarray((pixels.astype(np.int32) - int(offset)).astype(np.uint16)).save(
        stream, "PNG", compress_level=1
    )
    return stream.getvalue()


def _nifti(pixels: NDArray[Any], spacing_mm: float) -> bytes:
    """Axes i to the right and j to anterior, as most tools write it."""
    import nibabel as nib

    affine = np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0])
    volume: bytes = nib.Nifti1Image(np.ascontiguousarray(pixels.T[::-1, ::-1])[:, :, None], affine).to_bytes()
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
