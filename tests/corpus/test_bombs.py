"""Files that are long to decode are refused before they are decoded; ordinary ones are not."""

import io
import struct
import time
import zlib

import pytest
from PIL import Image

from cliper.pipeline.corpus.bombs import jpeg_scans
from cliper.pipeline.corpus.decode import decode
from cliper.pipeline.errors import ImageError


def progressive(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 40).convert("RGB").save(buffer, "JPEG", progressive=True)
    return buffer.getvalue()


def with_scans(data: bytes, count: int) -> bytes:
    """The last scan of a JPEG again and again."""
    start, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:end] + data[start:end] * count + data[end:]


def png(pixels: bytes, size: int = 8) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_a_jpeg_of_many_scans_is_refused_at_once() -> None:
    hostile = with_scans(progressive((3000, 2000)), 400)
    began = time.perf_counter()
    with pytest.raises(ImageError, match=r"a JPEG of 41\d scans; one of its size may have 166") as raised:
        decode(hostile, 100_000_000)
    assert raised.value.kind == "oversized"
    assert time.perf_counter() - began < 10  # about as fast as the bytes are read; decoding took 60 s


def test_scans_are_counted_in_the_image_alone() -> None:
    data = progressive((64, 48))
    count = jpeg_scans(data)
    assert count == data.count(b"\xff\xda") > 5
    comment = b"\xff\xfe" + struct.pack(">H", 202) + b"\xff\xda" * 100
    noisy = data[:2] + comment + data[2:] + b"\xff\xda" * 5000  # as in a video after a photograph
    assert jpeg_scans(noisy) == count
    assert decode(noisy, 10**8).width == 64


def test_a_png_of_more_data_than_pixels_is_refused() -> None:
    packer = zlib.compressobj(0)
    stored = b"".join(packer.compress(bytes(1 << 20)) for _ in range(64)) + packer.flush()
    with pytest.raises(ImageError, match="bytes of compressed pixels"):
        decode(png(stored), 10**8)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_uncompressed_pngs_are_read(mode: str) -> None:
    noise = Image.effect_noise((1500, 900), 90)
    image = Image.new(mode, noise.size) if mode == "I;16" else noise.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=0)
    assert decode(buffer.getvalue(), 10**8).width == 1500
