"""Decoding: formats, pixel types, EXIF orientation, and files with a misleading name."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from cliper.pipeline.corpus.decode import decode, to_file_grid, upright
from cliper.pipeline.errors import ImageError
from tests.support.fakes import BROKEN, jpeg

LIMIT = 100_000_000


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def gradient(width: int = 12, height: int = 9) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([rows * 20, columns * 15, rows + columns], axis=-1).astype(np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    found = decode(saved(gradient(), kind, **options), LIMIT)
    assert np.array_equal(found.pixels, np.array(gradient()))
    assert (found.width, found.height, found.orientation) == (12, 9, 1)


def test_jpeg_and_first_frame_of_gif() -> None:
    assert np.abs(decode(saved(gradient(), "JPEG", quality=95), LIMIT).pixels.astype(int) - gradient()).max() < 30
    first, second = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    found = decode(saved(first, "GIF", save_all=True, append_images=[second]), LIMIT)
    assert found.pixels[0, 0].tolist() == [255, 0, 0]


def test_pixel_types_become_rgb() -> None:
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    for image in (Image.fromarray(grey), Image.fromarray(grey.astype(np.uint16) * 256 + 77)):
        found = decode(saved(image, "PNG"), LIMIT).pixels
        assert np.array_equal(found, np.repeat(grey[..., None], 3, axis=2))
    assert (
        np.abs(decode(saved(gradient().convert("CMYK"), "TIFF"), LIMIT).pixels.astype(int) - gradient()).max() <= 2
    )
    palette = gradient().convert("P")
    assert np.array_equal(decode(saved(palette, "PNG"), LIMIT).pixels, np.array(palette.convert("RGB")))
    assert decode(saved(Image.new("1", (3, 3), 1), "PNG"), LIMIT).pixels.min() == 255


def test_transparency_is_laid_over_white() -> None:
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    image.putpixel((1, 0), (10, 20, 30, 0))
    assert decode(saved(image, "PNG"), LIMIT).pixels[0].tolist() == [[10, 20, 30], [255, 255, 255]]


@pytest.mark.parametrize("kind", ["TIFF", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_matches_pillow_and_masks_are_mapped_back(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(gradient(), kind, exif=exif)
    found = decode(data, LIMIT)
    with Image.open(io.BytesIO(data)) as image:
        shown = np.array(ImageOps.exif_transpose(image))
        assert np.array_equal(found.pixels, shown)
        assert found.orientation == orientation
        assert (found.width, found.height) == gradient().size
    assert np.array_equal(to_file_grid(found.pixels, orientation), np.array(gradient()))
    assert to_file_grid(found.pixels[..., 0], orientation).shape == (found.height, found.width)


@given(orientation=st.integers(1, 8), height=st.integers(1, 5), width=st.integers(1, 5))
def test_orientations_invert(orientation: int, height: int, width: int) -> None:
    grid = np.arange(height * width).reshape(height, width)
    assert np.array_equal(to_file_grid(upright(grid, orientation), orientation), grid)


def test_damaged_exif_is_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 77
    assert decode(saved(gradient(), "JPEG", exif=exif), LIMIT).orientation == 1
    data = saved(gradient(), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    assert decode(data, LIMIT).orientation == 1


@pytest.mark.parametrize("kind", sorted(BROKEN))
def test_broken_files_name_their_kind(kind: str) -> None:
    with pytest.raises(ImageError) as caught:
        decode(BROKEN[kind], LIMIT)
    assert caught.value.kind == kind


def test_oversized_is_refused_before_decoding() -> None:
    with pytest.raises(ImageError, match=r"12 x 9 pixels; the limit is 100 \(max_pixels in the config\)"):
        decode(saved(gradient(), "PNG"), 100)


@settings(max_examples=300, deadline=None)
@given(
    data=st.binary(max_size=200),
    start=st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF"]),
)
def test_random_bytes_are_an_image_error(data: bytes, start: bytes) -> None:
    with pytest.raises(ImageError):
        decode(start + data, LIMIT)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 3), cuts=st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 255)), max_size=20))
def test_damaged_jpegs_decode_or_raise_image_error(seed: int, cuts: list[tuple[int, int]]) -> None:
    data = bytearray(jpeg(seed))
    for place, value in cuts:
        data[place % len(data)] = value
    try:
        found = decode(bytes(data), 1_000_000)
    except ImageError:
        return
    assert found.pixels.dtype == np.uint8
    assert found.pixels.shape[2] == 3
