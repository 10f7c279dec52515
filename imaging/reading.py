"""Bytes become an Image, or an error that says what to send instead. No URL is fetched, no pickle opened."""

from __future__ import annotations

import functools
import gzip
import io
import math
import re
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from imaging.errors import ImageError, TooLarge, Unreadable, WrongShape, WrongType
from imaging.image import ACQUISITION, Image
from imaging.vocabulary import ContentType

MAX_PIXELS = 4096 * 4096
MOST_READS = 50_000
TILTED = 0.2  # radians; DICOM is held to about the same
LITTLE_ENDIAN = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1")
SUFFIXES = {
    ".png": ContentType.PNG,
    ".dcm": ContentType.DICOM,
    ".nii": ContentType.NIFTI,
    ".gz": ContentType.NIFTI,
    ".npy": ContentType.NPY,
}


def decode(body: bytes, content_type: str, png_offset: float = 0.0, limit: int = MAX_PIXELS) -> Image:
    """Read one slice, colour photograph or volume.

    Args:
        body: the file.
        content_type: one of `ContentType`; parameters behind a semicolon are ignored.
        png_offset: added to the grey values of a PNG (a CT sent as PNG stores HU + 1024).
        limit: most pixels of an .npy or NIfTI file.

    Returns:
        The image, rows and columns as a radiologist's screen shows them, depth from the feet up.

    Raises:
        WrongType: the content type, or the encoding inside the file, is not taken.
        Unreadable: the bytes are damaged or are something else.
        TooLarge: more than 4096 x 4096 pixels, or the limit.
        WrongShape: not axial, or several images.
        NotFinite: NaN or infinity.
    """
    name = content_type.split(";")[0].strip().lower()
    if name not in READERS:
        raise WrongType(
            f"Content type {name[:60] or '(none)'!r} is not taken.",
            "Send " + ", ".join(sorted(READERS)) + ".",
        )
    if not body:
        raise Unreadable("The body is empty.", "Send the file itself as the body.")
    try:
        return _read_png(body, png_offset) if name == ContentType.PNG else READERS[name](body, limit)
    except ImageError:
        raise
    except Exception as error:  # hostile bytes in other people's parsers raise whatever they like
        raise Unreadable(
            f"The body cannot be read as {name} ({type(error).__name__}).", "Send the whole, unchanged file."
        ) from error


def _bounded(*shape: int, limit: int = MAX_PIXELS) -> None:
    if math.prod(shape) > limit:
        raise TooLarge(
            f"The image has {' x '.join(map(str, shape))} pixels.", f"Send at most {limit} pixels."
        )


def _read_png(body: bytes, offset: float) -> Image:
    from PIL import Image as Pillow

    with Pillow.open(io.BytesIO(body), formats=("PNG",)) as picture:
        _bounded(picture.height, picture.width)
        if picture.mode not in ("L", "I;16", "I;16B", "I", "RGB"):
            raise WrongType(
                f"The PNG has mode {picture.mode}.", "Send 8 or 16 bit greyscale, or 8 bit RGB; no alpha."
            )
        if picture.mode == "RGB" and any(";16" in str(part) for part in picture.tile):
            raise WrongType("The PNG has 16 bit a colour.", "Send 8 bit RGB; half of it would be lost.")
        if offset and picture.mode in ("L", "RGB"):
            raise WrongType(
                "An 8 bit PNG cannot hold Hounsfield units.",
                f"Send 16 bit PNG of HU {-offset:+.0f}, or DICOM.",
            )
        pixels = np.asarray(picture, dtype=np.float32)
    return Image(pixels + np.float32(offset) if offset else pixels)


def _read_npy(body: bytes, limit: int) -> Image:
    size = int.from_bytes(body[8:10], "little") + 10
    if body[:8] != b"\x93NUMPY\x01\x00":
        raise Unreadable("This is no .npy of version 1.0.", "Write it with numpy.save.")
    shape, fortran, dtype = _npy_header(body[:size])
    if dtype.hasobject or dtype.kind not in "iuf":
        raise WrongType(f"The .npy holds {dtype}.", "Send integers or floats.")
    if len(shape) not in (2, 3):
        raise WrongShape(f"The array has shape {shape}.", "Send rows, columns[, 3], or depth, rows, columns.")
    _bounded(*shape, limit=limit)
    pixels = np.frombuffer(body, dtype, math.prod(shape), size)
    with np.errstate(over="ignore"):
        return Image(pixels.reshape(shape, order="F" if fortran else "C").astype(np.float32))


@functools.lru_cache(256)
def _npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether columns come first, and dtype; a hospital sends the same header again and again."""
    reader = io.BytesIO(header)
    np.lib.format.read_magic(reader)
    return np.lib.format.read_array_header_1_0(reader)


def _inflate(body: bytes, pixels: int) -> bytes:
    limit = pixels * 8 + 4096
    with gzip.GzipFile(fileobj=io.BytesIO(body)) as stream:
        raw = stream.read(limit + 1)
    if len(raw) > limit:
        raise TooLarge("The file inflates beyond the limit.", f"Send at most {pixels} pixels.")
    return raw


def _read_nifti(body: bytes, limit: int) -> Image:
    import nibabel as nib

    volume = nib.Nifti1Image.from_bytes(_inflate(body, limit) if body[:2] == b"\x1f\x8b" else body)
    if volume.ndim not in (2, 3):
        raise WrongShape(f"The NIfTI has shape {volume.shape}.", "Send (i, j), (i, j, 1) or (i, j, k).")
    _bounded(*volume.shape, limit=limit)
    if volume.get_data_dtype().kind not in "iuf":
        raise WrongType(f"The NIfTI holds {volume.get_data_dtype()}.", "Send integers or floats.")
    if not (int(volume.header["sform_code"]) or int(volume.header["qform_code"])):
        raise WrongShape("The NIfTI does not say how it lies.", "Set its sform or qform.")
    flips, spacing = _axial(np.asarray(volume.affine))
    pixels = np.asarray(volume.dataobj, dtype=np.float32).reshape((*volume.shape, 1)[:3])
    turned = np.flip(pixels, tuple(axis for axis in range(3) if flips[axis])).T
    return Image(np.ascontiguousarray(turned if len(turned) > 1 else turned[0]), spacing_mm=spacing)


def _axial(affine: np.ndarray) -> tuple[tuple[bool, bool, bool], tuple[float, float]]:
    """Whether i, j, k must be turned to run left, to posterior and up, and (row, column) spacing in mm."""
    import nibabel as nib

    codes = nib.aff2axcodes(affine)
    if codes[0] not in ("L", "R") or codes[1] not in ("A", "P"):
        raise WrongShape(
            f"The NIfTI axes run to {''.join(str(c) for c in codes)}.",
            "Send axial slices: i left-right, j front-back.",
        )
    sizes = np.linalg.norm(affine[:3, :2], axis=0)
    if np.max(nib.affines.obliquity(affine)) > TILTED:
        raise WrongShape("The NIfTI lies oblique.", "Resample it to the scanner's axes first.")
    return (codes[0] == "R", codes[1] == "A", codes[2] == "I"), (float(sizes[1]), float(sizes[0]))


class _Counted(io.BytesIO):
    """Bytes that may be asked for so often only: each element of a DICOM file costs its reader some reads."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > MOST_READS:
            raise TooLarge("The DICOM object has too many elements.", "Send the slice without private data.")
        return super().read(size)


def _read_dicom(body: bytes) -> Image:
    import pydicom

    stream = _Counted(body)
    _check_syntax(stream)
    return _open_dicom(pydicom.dcmread(stream))


def _check_syntax(stream: io.BytesIO) -> None:
    """Read the file's meta group alone: a deflated body must be refused before it is inflated."""
    from pydicom.filereader import read_dataset, read_preamble
    from pydicom.uid import UID

    read_preamble(stream, force=False)
    meta = read_dataset(stream, False, True, stop_when=lambda tag, _vr, _length: tag.group != 2)
    syntax = UID(meta.TransferSyntaxUID)
    stream.seek(0)
    if syntax not in LITTLE_ENDIAN:
        raise WrongType(
            f"Transfer syntax {syntax.name[:60]} is not taken.",
            "Send Implicit or Explicit VR Little Endian, uncompressed.",
        )


def _open_dicom(data: Any) -> Image:
    _bounded(int(data.Rows), int(data.Columns))
    if int(data.get("NumberOfFrames", 1) or 1) != 1 or int(data.get("SamplesPerPixel", 1)) != 1:
        raise WrongShape("The DICOM object has several frames or colours.", "Send one greyscale slice.")
    if data.PhotometricInterpretation != "MONOCHROME2":
        raise WrongType(
            f"Photometric interpretation {str(data.PhotometricInterpretation)[:16]} is not taken.",
            "Send MONOCHROME2, where larger values are brighter.",
        )
    _upright(data)
    slope, intercept = float(data.get("RescaleSlope", 1)), float(data.get("RescaleIntercept", 0))
    spacing = data.get("PixelSpacing")
    return Image(
        data.pixel_array.astype(np.float32) * np.float32(slope) + np.float32(intercept),
        spacing_mm=(float(spacing[0]), float(spacing[1])) if spacing else None,
        modality=str(data.get("Modality", "")) or None,
        subject=str(data.get("PatientID", "")) or None,
        acquisition=_acquisition(data),
    )


def _acquisition(data: Any) -> dict[str, str]:
    """What the header says of how it was made; no word of the patient, and only plain characters."""
    told = {name: str(data.get(keyword, "") or "") for name, keyword in ACQUISITION.items()}
    plain = {name: re.sub(r"[^A-Za-z0-9 ._+-]", " ", value)[:32].strip() for name, value in told.items()}
    plain["contrast_agent"] = "yes" if plain["contrast_agent"] else ""  # the name of a drug is free text
    return {name: value for name, value in plain.items() if value}


def _upright(data: Any) -> None:
    orientation = getattr(data, "ImageOrientationPatient", None)
    if orientation is None:
        return
    if not np.allclose([float(v) for v in orientation], [1, 0, 0, 0, 1, 0], atol=0.2):
        raise WrongShape(
            "The slice is not axial, or is turned.", "Send axial slices with orientation 1,0,0,0,1,0."
        )


READERS: dict[str, Callable[[bytes, int], Image]] = {
    ContentType.PNG: lambda body, _: _read_png(body, 0.0),
    ContentType.DICOM: lambda body, _: _read_dicom(body),
    ContentType.NIFTI: _read_nifti,
    ContentType.NPY: _read_npy,
}


def measure_volume(head: bytes, content_type: str) -> tuple[int, ...]:
    """The shape of a volume, (depth, rows, columns), by the first bytes of its file alone.

    Args:
        head: at least the first 4096 bytes of an .npy or (perhaps gzipped) NIfTI file.
        content_type: which of the two.

    Raises:
        WrongType: neither of the two.
        Unreadable: something else.
    """
    import nibabel as nib

    try:
        if content_type == ContentType.NPY:
            return _npy_header(head[: int.from_bytes(head[8:10], "little") + 10])[0]
        if content_type == ContentType.NIFTI:
            raw = zlib.decompressobj(31).decompress(head, 348) if head[:2] == b"\x1f\x8b" else head
            shape = nib.Nifti1Header(raw[:348], check=False).get_data_shape()
            return tuple(int(side) for side in reversed(shape))
    except Exception as error:  # hostile bytes in other people's parsers
        raise Unreadable(f"This is no {content_type}.", "Send the whole, unchanged file.") from error
    raise WrongType(f"{content_type} holds no volume.", "Send application/x-nifti or application/x-npy.")


def write_like(labels: np.ndarray, body: bytes) -> tuple[bytes, float]:
    """A mask as NIfTI that lies as the NIfTI volume lay of which it was made.

    Args:
        labels: uint8 (depth, rows, columns), as `decode` turned them.
        body: the volume's file; of a gzipped one the header is enough.

    Returns:
        The gzipped file, with the volume's affine, and mm³ of a voxel.
    """
    import nibabel as nib

    raw = zlib.decompressobj(31).decompress(body, 352) if body[:2] == b"\x1f\x8b" else body
    header = nib.Nifti1Header(raw[:348])
    for told in ("descrip", "aux_file", "db_name", "intent_name"):  # where some tools put a patient's name
        header[told] = b""
    header.set_data_dtype(np.uint8)
    header["cal_min"] = header["cal_max"] = 0
    affine = header.get_best_affine()
    flips, _ = _axial(affine)
    turned = np.flip(labels.T, tuple(axis for axis in range(3) if flips[axis]))
    made = nib.Nifti1Image(np.ascontiguousarray(turned), None, header)
    return gzip.compress(made.to_bytes(), 1, mtime=0), float(abs(np.linalg.det(affine[:3, :3])))
