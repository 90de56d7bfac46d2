"""Files that are small to send and long to decode, found before they are decoded."""

import re
import struct

from cliper.pipeline.errors import ImageError

# A decoder goes over all pixels once a scan. Encoders write up to 10 scans in colour, a few more on request.
SCANS_FOR_ANY = 20
SCANNED_PIXELS = 1_000_000_000  # pixels times scans, above SCANS_FOR_ANY scans
SPARE_BYTES = 1 << 20  # of compressed pixels, beyond what the pixels need uncompressed

_SCAN = b"\xff\xda"
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_PNG_HEADER = 33  # signature, IHDR with its length, kind and checksum
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


def refuse_bombs(data: bytes, pixels: int) -> None:
    """Raise ImageError of kind `oversized` for a JPEG of too many scans or a PNG of too much compressed data.

    `pixels`: width times height, as the header says.
    """
    if data.startswith(b"\xff\xd8") and data.count(_SCAN) > SCANS_FOR_ANY:
        scans, most = jpeg_scans(data), max(SCANS_FOR_ANY, SCANNED_PIXELS // max(1, pixels))
        if scans > most:
            raise ImageError("oversized", f"a JPEG of {scans} scans; one of its size may have {most}")
    elif data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) > SPARE_BYTES:
        found, most = _png_bytes(data), _most_png_bytes(data)
        if found > most:
            raise ImageError("oversized", f"{found:,} bytes of compressed pixels; its size needs at most {most:,}")


def jpeg_scans(data: bytes) -> int:
    """Scans of the first image in a JPEG file; bytes in comments and after its end do not count."""
    place, scans = 2, 0
    while place + 4 <= len(data) and data[place] == 0xFF and data[place + 1] != 0xD9:
        marker = data[place + 1]
        if marker in (0x01, 0xFF) or 0xD0 <= marker <= 0xD8:  # fill bytes, markers without a length
            place += 1 if marker == 0xFF else 2
            continue
        scans += marker == 0xDA
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if marker == 0xDA:
            found = _NEXT_MARKER.search(data, place)
            place = found.start() if found else len(data)
    return scans


def _png_bytes(data: bytes) -> int:
    """Bytes of the chunks that hold pixels, as their headers say."""
    place, total = 8, 0
    while place + 8 <= len(data):
        (size,) = struct.unpack(">I", data[place : place + 4])
        total += size if data[place + 4 : place + 8] == b"IDAT" else 0
        place += 12 + size
    return total


def _most_png_bytes(data: bytes) -> int:
    """What the pixels take uncompressed, in zlib's stored blocks, interlaced or not, and SPARE_BYTES."""
    if len(data) < _PNG_HEADER:
        return SPARE_BYTES
    width, height, depth, colours = struct.unpack(">IIBB", data[16:26])
    row = -(-width * depth * _CHANNELS.get(colours, 4) // 8) + 16
    return int(row * height * 1.02) + SPARE_BYTES
