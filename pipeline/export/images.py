"""Source images for an export: their bytes, in the grid of the mask.

A mask is in its file's own pixel grid. Some trainers apply a file's EXIF orientation and some do not, so a
copied image has orientation 1, and every reader uses the grid of the mask.
"""

import io
import struct
from collections.abc import Collection, Sequence

import numpy as np
from PIL import Image

from cliper.pipeline.corpus.decode import FORMATS, decode, exif_orientation, to_file_grid
from cliper.pipeline.errors import ImageError

ENDINGS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "TIFF": ".tif", "BMP": ".bmp", "GIF": ".gif"}
_ORIENTATION = 0x0112
_QUALITY = 95  # of photographs that must become JPEG


def in_mask_grid(data: bytes, formats: Sequence[str], max_pixels: int) -> tuple[bytes, str]:
    """An image file with orientation 1 in one of `formats`, and its extension.

    If possible the bytes are kept: unchanged, or as a JPEG with its orientation tag set to 1. Otherwise the image
    is re-encoded as formats[0]: PNG losslessly, JPEG at quality 95. Raises ImageError as decode does.
    """
    stored, orientation = _look(data)
    if stored in formats and orientation == 1:
        return data, ENDINGS[stored]
    if stored == "JPEG" and stored in formats:
        plain = without_orientation(data)
        if _look(plain) == ("JPEG", 1):
            return plain, ENDINGS[stored]
    found = decode(data, max_pixels, "accept")  # the run has already accepted this image
    return _encode(to_file_grid(found.pixels, found.orientation), formats[0]), ENDINGS[formats[0]]


def size_of(data: bytes) -> tuple[int, int]:
    """(width, height) of an image file's pixel grid, from its header."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return image.size


def _look(data: bytes) -> tuple[str, int]:
    """Format and EXIF orientation, from the header."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return str(image.format), exif_orientation(image)
    except Exception as error:  # Pillow's plugins raise nearly any type on damaged files
        raise ImageError("corrupt", f"{type(error).__name__}: {error}") from error


def _encode(pixels: np.ndarray, name: str) -> bytes:
    buffer = io.BytesIO()
    options = {"quality": _QUALITY, "subsampling": 0} if name == "JPEG" else {"compress_level": 1}
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format=name, **options)
    return buffer.getvalue()


def without_orientation(jpeg: bytes) -> bytes:
    """The JPEG with its EXIF orientation tag, if any, set to 1; no other byte changes."""
    data = bytearray(jpeg)
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF and data[place + 1] not in _SCANS:
        if data[place + 1] == 0xE1 and data[place + 4 : place + 10] == b"Exif\0\0":
            _reset(data, place + 10)
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return bytes(data)


_SCANS: Collection[int] = (0xDA, 0xD9)  # pixel data follows


def _reset(data: bytearray, tiff: int) -> None:
    """Set the orientation in the first directory of the TIFF structure at `tiff`."""
    order = "<" if data[tiff : tiff + 2] == b"II" else ">"
    try:
        directory = tiff + struct.unpack_from(f"{order}I", data, tiff + 4)[0]
        entries = struct.unpack_from(f"{order}H", data, directory)[0]
        for i in range(entries):
            entry = directory + 2 + 12 * i
            if struct.unpack_from(f"{order}HH", data, entry) == (_ORIENTATION, 3):
                struct.pack_into(f"{order}H", data, entry + 8, 1)
    except struct.error:
        return  # damaged EXIF; the caller checks whether an orientation remains
