"""Small files of many kinds that claim, or unpack to, far more than they are."""

import gzip
import io
import os
import struct
import zlib

import numpy as np
from PIL import Image as Pillow

from imaging.vocabulary import ContentType, Modality
from services.findings import encode
from tests.tiny import SIZE
from tests.tiny_gateway import draw_pixels

MIB = 2**20
OFFSET = -1024.0


def as_npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(rows, columns, *chunks, raw=b""):
    """A PNG of 8 bit grey that may say what it likes."""
    head = struct.pack(">IIBBBBB", columns, rows, 8, 0, 0, 0, 0)
    parts = [chunk(b"IHDR", head), *chunks, chunk(b"IDAT", raw), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def unpack_to(size):
    """Zeros, deflated, as zlib has them; made from one block."""
    packer = zlib.compressobj(1)
    return b"".join([*(packer.compress(bytes(MIB)) for _ in range(size // MIB)), packer.flush()])


def gunzip_to(size):
    """The same as members of gzip, one after the other."""
    return gzip.compress(bytes(MIB)) * (size // MIB)


def nifti(**fields):
    import nibabel as nib

    image = nib.Nifti1Image.from_bytes(encode(draw_pixels(), ContentType.NIFTI, 2.0, Modality.CT))
    body = bytearray(image.to_bytes())
    for name, value in fields.items():
        image.header.structarr[name] = value
    body[:348] = image.header.binaryblock
    return bytes(body)


def dicom(syntax=None, **values):
    import pydicom
    from pydicom.uid import UID

    data = pydicom.dcmread(io.BytesIO(encode(draw_pixels(), ContentType.DICOM, 2.0, Modality.CT)))
    for name, value in values.items():
        setattr(data, name, value)
    stream = io.BytesIO()
    data.save_as(stream, enforce_file_format=True)
    body = stream.getvalue()
    if syntax:
        plain = b"1.2.840.10008.1.2.1\0"
        body = body.replace(plain, UID(syntax).encode().ljust(len(plain), b"\0"), 1)
    return body


def nested(depth):
    """A DICOM file whose sequences lie in each other."""
    item = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    opened = struct.pack("<HH2sHI", 0x0008, 0x1115, b"SQ", 0, 0xFFFFFFFF) + item
    return dicom().split(b"\x08\x00\x16\x00")[0] + opened * depth


def tiff(rows, columns):
    stream = io.BytesIO()
    Pillow.fromarray(np.zeros((8, 8), np.uint8)).save(stream, "TIFF", compression="tiff_deflate")
    body = stream.getvalue()
    for tag, side in ((256, columns), (257, rows)):
        at = body.index(struct.pack("<HH", tag, 4 if struct.pack("<HH", tag, 4) in body else 3))
        body = body[: at + 2] + struct.pack("<HII", 4, 1, side) + body[at + 12 :]
    return body


def make_bombs():
    """Small files of many kinds that claim, or unpack to, far more than they are."""
    packed, size = unpack_to(400 * MIB), 2**62
    huge = as_npy(np.zeros((1, 2), np.int16))
    grown = {shape: huge.replace(b"(1, 2)", shape) for shape in
             (b"(99999, 99999)", b"(-1, -1)", b"(%d, %d)" % (size, size), b"(2, %d)" % size)}  # fmt: skip
    return {
        **{f"npy of {shape.decode()}": body for shape, body in grown.items()},
        "npy of text": as_npy(np.array([["a" * 1000]])),
        "npy of brackets": b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"(" * 9000,
        "npz": b"PK\x03\x04" + os.urandom(200),
        "PNG of 60000 x 60000": png(60000, 60000, raw=packed),
        "PNG with more than it says": png(SIZE, SIZE, raw=packed),
        "PNG with a long text": png(SIZE, SIZE, chunk(b"zTXt", b"Comment\0\0" + packed)),
        "PNG with a long profile": png(SIZE, SIZE, chunk(b"iCCP", b"icc\0\0" + packed)),
        "PNG within the limits": encode(np.zeros((4096, 4096), np.int16), ContentType.PNG, 1, "", OFFSET),
        "NIfTI of gigabytes": gunzip_to(2000 * MIB),
        "NIfTI with a tail": gzip.compress(nifti()) + gunzip_to(2000 * MIB),
        "NIfTI of 32767^3": nifti(dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]),
        "NIfTI that starts nowhere": nifti(vox_offset=1e30),
        "NIfTI scaled away": nifti(scl_slope=3e38),
        "NIfTI of objects": nifti(datatype=2304, bitpix=32),
        "DICOM of 65535 x 65535": dicom(Rows=65535, Columns=65535),
        "DICOM of frames": dicom(NumberOfFrames=2**31 - 1),
        "DICOM deflated": dicom("1.2.840.10008.1.2.1.99")[:400] + packed[2:-4],
        "DICOM in JPEG 2000": dicom("1.2.840.10008.1.2.4.90"),
        "DICOM in DICOM in DICOM": nested(5000),
        "TIFF": tiff(8, 8),
        "TIFF of 2^31": tiff(2**31, 2**31),
        "XML": b"<!DOCTYPE a [<!ENTITY b 'c'>" + b"<!ENTITY b '&b;&b;'>" * 100 + b"]><svg>&b;</svg>",
    }
