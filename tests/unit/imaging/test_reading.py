"""Bytes become the same slice whatever the file, or an error that names the fault; nothing else ever."""

import contextlib
import gzip
import io
import random
import warnings

import nibabel as nib
import numpy as np
import pydicom
import pytest

from imaging.errors import ImageError, Unreadable, WrongShape, WrongType
from imaging.reading import decode
from imaging.vocabulary import ContentType
from services.encoding import encode

OFFSET = -1024.0
PIXELS = np.random.default_rng(0).integers(-1000, 1000, (32, 24)).astype(np.int16)
FILES = {kind: encode(PIXELS, kind, 2.0, "CT", OFFSET) for kind in ContentType}


def nifti(array, affine=None):
    return nib.Nifti1Image(array, np.eye(4) if affine is None else affine).to_bytes()


def dicom(**elements):
    data = pydicom.dcmread(io.BytesIO(FILES[ContentType.DICOM]))
    for name, value in elements.items():
        setattr(data, name, value)
    stream = io.BytesIO()
    data.save_as(stream)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ContentType)
def test_every_kind_of_file_holds_the_same_slice(kind):
    assert np.array_equal(decode(FILES[kind], kind, OFFSET).pixels, PIXELS)


def test_a_compressed_nifti_is_the_same_slice():
    assert np.array_equal(decode(gzip.compress(FILES[ContentType.NIFTI]), ContentType.NIFTI).pixels, PIXELS)


@pytest.mark.parametrize(("affine", "corner"), [
    (np.diag([2, 2, 2, 1]), (-1, -1)),    # i to the right, j to the front: the last of both is top left
    (np.diag([-2, 2, 2, 1]), (0, -1)),    # i to the left already
    (np.diag([2, -2, 2, 1]), (-1, 0)),    # j to the back already
    (np.diag([-2, -2, 2, 1]), (0, 0)),
])  # fmt: skip
def test_a_nifti_is_shown_as_a_radiologist_sees_it(affine, corner):
    volume = np.zeros((6, 8, 1), np.float32)
    volume[corner] = 1
    image = decode(nifti(volume, affine.astype(float)), ContentType.NIFTI)
    assert image.pixels.shape == (8, 6)
    assert image.pixels[0, 0] == 1  # the patient's right and front


@pytest.mark.parametrize("kind", ContentType)
def test_a_file_that_breaks_off_anywhere_is_unreadable(kind):
    body = FILES[kind]
    for length in {*range(1, 400, 7), *range(400, len(body) - 60, 97)}:
        with pytest.raises(ImageError):
            decode(body[:length], kind, OFFSET)


@pytest.mark.parametrize("kind", ContentType)
def test_changed_bytes_give_a_slice_or_a_named_error(kind):
    draw = random.Random(str(kind))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(400):
            body = bytearray(FILES[kind])
            for _ in range(draw.choice([1, 2, 5])):
                body[draw.randrange(min(len(body), draw.choice([60, 350, 1000])))] = draw.randrange(256)
            with contextlib.suppress(ImageError):
                assert np.isfinite(decode(bytes(body), kind, OFFSET).pixels).all()


@pytest.mark.parametrize("said", ["MONOCHROME1", "PALETTE COLOR"])
def test_values_that_mean_another_brightness_are_not_taken_as_they_are(said):
    with pytest.raises(WrongType, match=said):
        decode(dicom(PhotometricInterpretation=said), ContentType.DICOM)


@pytest.mark.parametrize("dtype", [np.complex64, [("R", "u1"), ("G", "u1"), ("B", "u1")]])
def test_a_nifti_of_colours_or_complex_numbers_is_refused(dtype):
    with pytest.raises(WrongType):
        decode(nifti(np.zeros((8, 8, 1), dtype)), ContentType.NIFTI)


def test_a_coronal_slice_is_refused():
    affine = np.array([[2, 0, 0, 0], [0, 0, 2, 0], [0, 2, 0, 0], [0, 0, 0, 1]], float)
    with pytest.raises(WrongShape, match="axes"):
        decode(nifti(np.zeros((8, 8, 1), np.float32), affine), ContentType.NIFTI)


def test_a_small_file_that_inflates_beyond_the_limit_is_refused():
    bomb = gzip.compress(b"\0" * (200 * 2**20))
    with pytest.raises(ImageError, match="inflates"):
        decode(bomb, ContentType.NIFTI)


def test_the_error_of_a_parser_is_not_passed_on():
    with pytest.raises(Unreadable) as caught:
        decode(FILES[ContentType.NIFTI][:300], ContentType.NIFTI)
    assert "WrapStructError" in caught.value.fact
    assert len(caught.value.fact) < 100
