"""Bytes become the same slice whatever the file, or an error that names the fault; nothing else ever."""

import contextlib
import gzip
import io
import random
import struct
import warnings

import nibabel as nib
import numpy as np
import pydicom
import pytest

from imaging.errors import ImageError, TooLarge, Unreadable, WrongShape, WrongType
from imaging.reading import decode
from imaging.vocabulary import ContentType
from services.findings import encode, lossless_types

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


COLOUR = np.random.default_rng(1).integers(0, 256, (32, 24, 3)).astype(np.uint8)
VOLUME = np.random.default_rng(2).integers(-1000, 1000, (5, 32, 24)).astype(np.int16)


@pytest.mark.parametrize("pixels", [PIXELS, COLOUR, VOLUME], ids=["slice", "colour", "volume"])
def test_what_is_encoded_is_read_back_unchanged(pixels):
    for kind in lossless_types(pixels):
        offset = OFFSET if kind is ContentType.PNG and pixels.ndim == 2 else 0.0
        told = decode(encode(pixels, kind, 2.0, "CT", offset), kind, offset)
        assert np.array_equal(told.pixels, pixels), kind


def test_the_slices_of_a_nifti_run_from_the_feet_up_whichever_way_they_are_stored():
    volume = np.zeros((24, 32, 5), np.int16)
    volume[:, :, 0] = 7  # the first slice that is stored
    up = decode(nifti(volume, np.diag([2.0, 2.0, 3.0, 1.0])), ContentType.NIFTI).pixels
    down = decode(nifti(volume, np.diag([2.0, 2.0, -3.0, 1.0])), ContentType.NIFTI).pixels
    assert (up[0] == 7).all()
    assert (down[-1] == 7).all()


def test_a_volume_of_too_many_voxels_is_refused_before_it_is_read():
    head = nib.Nifti1Header()
    head.set_data_shape((4096, 4096, 4096))
    head.set_data_dtype(np.int16)
    with pytest.raises(TooLarge):
        decode(head_only(head), ContentType.NIFTI)


def head_only(header):
    header["vox_offset"], header["magic"] = 352, b"n+1"
    header.set_sform(np.eye(4), 1)
    return header.binaryblock + b"\0" * 4


def test_a_nifti_that_lies_oblique_or_nowhere_is_refused():
    from scipy.spatial.transform import Rotation

    tilted = np.eye(4)
    tilted[:3, :3] = Rotation.from_euler("x", 35, degrees=True).as_matrix() * 2
    volume = np.zeros((8, 8, 4), np.int16)
    with pytest.raises(WrongShape, match="oblique"):
        decode(nifti(volume, tilted), ContentType.NIFTI)
    nowhere = bytearray(nifti(volume))
    nowhere[252:256] = bytes(4)  # qform_code and sform_code
    with pytest.raises(WrongShape, match="how it lies"):
        decode(bytes(nowhere), ContentType.NIFTI)


def test_a_dicom_object_of_countless_elements_is_refused_before_they_are_read():
    body = encode(np.zeros((8, 8), np.int16), ContentType.DICOM, 1.0, "CT")
    place = body.index(struct.pack("<HH", 0x08, 0x60))
    empty = b"".join(struct.pack("<HH2sH", 9, 0x1000 + n % 0xFFF, b"LO", 0) for n in range(60_000))
    with pytest.raises(TooLarge, match="too many elements"):
        decode(body[:place] + empty + body[place:], ContentType.DICOM)
