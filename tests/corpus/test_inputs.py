"""Every file of tests/data/inputs has one outcome: the right pixels, or a reason that names what it is."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from cliper.pipeline.corpus.decode import decode, pixels_claimed
from cliper.pipeline.corpus.formats import FORMATS, SUFFIXES, sniff, why_left_out
from cliper.pipeline.errors import ImageError
from tests.conftest import ROOT
from tests.support.fakes import jpeg
from tests.support.labeled import label_small, rows_of

INPUTS = ROOT / "tests" / "data" / "inputs"
LIMIT = 100_000_000


def failure(data: bytes, **options: str) -> tuple[str, str]:
    with pytest.raises(ImageError) as caught:
        decode(data, LIMIT, **options)  # type: ignore[arg-type]
    return caught.value.kind, str(caught.value)


def ramp() -> np.ndarray:
    """The picture that most of the files hold: uint8 [48, 64, 3]."""
    rows, columns = np.mgrid[0:48, 0:64]
    return np.stack([columns * 4, rows * 5, rows * 2 + columns * 2], axis=-1).astype(np.uint8)


def test_the_files_hold_the_ramp() -> None:
    assert np.array_equal(decode((INPUTS / "thumbfirst.tif").read_bytes(), LIMIT).pixels, ramp())


@pytest.mark.parametrize(("name", "off"), [("avif.avif", 8), ("j2k.jp2", 3), ("heic.heic", 12)])
def test_formats_of_the_extra_are_read(name: str, off: int) -> None:
    found = decode((INPUTS / name).read_bytes(), LIMIT)
    assert np.abs(found.pixels.astype(int) - ramp()).max() <= off
    assert name.endswith(SUFFIXES)


def test_jpeg_xl_is_read(tmp_path: Path) -> None:
    Image.fromarray(ramp()).save(tmp_path / "a.jxl", lossless=True)
    assert np.array_equal(decode((tmp_path / "a.jxl").read_bytes(), LIMIT).pixels, ramp())


def test_the_format_follows_content_not_extension(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes((INPUTS / "heic.heic").read_bytes())
    [row] = rows_of(label_small(tmp_path, tmp_path.parent / "run"))
    assert (row["status"], row["width"], row["height"]) == ("ok", 64, 48)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("g12.tif", lambda x, y: x * 65 // 16),  # 12 bits in 16, by MaxSampleValue: 65 * x is the stored value
        ("g16_miniswhite.tif", lambda x, y: 255 - (x * 260 >> 8)),
    ],
)
def test_grey_of_more_than_8_bits_fills_the_range(name: str, expected: object) -> None:
    rows, columns = np.mgrid[0:48, 0:64]
    wanted = expected(columns, rows)  # type: ignore[operator]
    found = decode((INPUTS / name).read_bytes(), LIMIT).pixels
    assert np.array_equal(found[..., 0], wanted)
    assert np.array_equal(found[..., 0], found[..., 2])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("u32_8bitdata.tif", "1 x 32-bit unsigned samples"),
        ("rgb16_planar.tif", "3 x 16-bit unsigned samples, RGB, in planes"),
        ("band8_rgb.tif", "TIFF: samples of this layout are not read (8 x 8-bit"),
        ("band4_minisblack.tif", "4 x 8-bit unsigned samples, min-is-black"),
        ("rgb8_webp.tif", "TIFF: compression WebP is not read"),
        ("jpeg12.jpg", "JPEG with 12 bits per sample"),
    ],
)
def test_images_that_are_not_read_are_unsupported_by_name(name: str, words: str) -> None:
    kind, message = failure((INPUTS / name).read_bytes())
    assert kind == "unsupported"
    assert words in message


def test_the_outcome_of_every_image_file_is_tested() -> None:
    images = {path.name for path in INPUTS.iterdir() if path.suffix not in (".tar", ".parquet")}
    source = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{name}"' in source for name in images)


def tiff(values: np.ndarray, **tags: int | tuple[int, ...]) -> bytes:
    """An uncompressed little-endian TIFF of `values` with tags by name, written without a library."""
    names = {"bits": 258, "photometric": 262, "max_value": 281, "sample_format": 339, "samples": 277}
    data = values.tobytes()
    fields: dict[int, tuple[int, ...]] = {256: (values.shape[1],), 257: (values.shape[0],), 259: (1,), 273: (8,)}
    fields |= {278: (values.shape[0],), 279: (len(data),), 277: (1,), 262: (1,)}
    fields |= {names[k]: v if isinstance(v, tuple) else (v,) for k, v in tags.items()}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value[0]) for tag, value in sorted(fields.items()))
    directory = struct.pack("<H", len(fields)) + entries + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory


def test_packed_12_bits() -> None:
    values = np.array([[0, 16, 2048, 4095]])
    pairs = values.reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], axis=-1)
    data = tiff(packed.astype(np.uint8).reshape(1, -1), bits=12).replace(
        struct.pack("<HHII", 256, 4, 1, 6), struct.pack("<HHII", 256, 4, 1, 4)
    )
    assert decode(data, LIMIT).pixels[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize(
    ("values", "tags"),
    [
        (np.zeros((4, 4), np.int16), {"bits": 16, "sample_format": 2}),
        (np.zeros((4, 4), np.int32), {"bits": 32, "sample_format": 2}),
        (np.zeros((4, 4), np.uint32), {"bits": 32}),
        (np.zeros((4, 4), np.float32), {"bits": 32, "sample_format": 3}),
        (np.zeros((4, 4), np.int8), {"bits": 8, "sample_format": 2}),
    ],
)
def test_samples_without_an_agreed_range_are_unsupported(values: np.ndarray, tags: dict[str, int]) -> None:
    assert failure(tiff(values, **tags))[0] == "unsupported"


def test_ordinary_16_bit_tiffs_keep_their_upper_bits() -> None:
    values = np.arange(16, dtype=np.uint16).reshape(4, 4) * 4096 + 77
    assert np.array_equal(decode(tiff(values, bits=16), LIMIT).pixels[..., 0], values >> 8)
    lying = tiff(values, bits=16, max_value=300)  # samples above MaxSampleValue: the tag is wrong
    assert np.array_equal(decode(lying, LIMIT).pixels[..., 0], values >> 8)


def test_a_transparent_grey_of_16_bits_is_white() -> None:
    values = np.array([[0, 300, 60000]], np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, format="PNG", transparency=300)
    assert decode(buffer.getvalue(), LIMIT).pixels[0, :, 0].tolist() == [0, 255, 234]


def pages(*images: tuple[Image.Image, int | None]) -> bytes:
    """A TIFF of several pages, each with its NewSubfileType."""
    buffer = io.BytesIO()
    with TiffImagePlugin.AppendingTiffWriter(buffer) as writer:
        for image, kind in images:
            info = TiffImagePlugin.ImageFileDirectory_v2()
            if kind is not None:
                info[254] = kind
            image.save(writer, format="TIFF", tiffinfo=info)
            writer.newFrame()
    return buffer.getvalue()


def test_the_full_page_is_labeled() -> None:
    small, large, other = (
        Image.new("RGB", size, c) for size, c in (((4, 3), "red"), ((8, 6), "lime"), ((8, 6), "blue"))
    )
    found = decode(pages((small, 1), (large, 0), (other, 0)), LIMIT)
    assert (found.width, found.height) == (8, 6)
    assert found.pixels[0, 0].tolist() == [0, 255, 0]
    assert found.pages == 2
    mask = decode(pages((small, 0), (large, 4)), LIMIT)
    assert (mask.width, mask.height, mask.pages) == (4, 3, 1)
    assert pixels_claimed(pages((small, None), (large, None))) == 48


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "MPO", "JPEG"])
def test_frames_are_counted(form: str) -> None:
    red, blue = Image.new("RGB", (8, 6), "red"), Image.new("RGB", (8, 6), "blue")
    buffer = io.BytesIO()
    red.save(buffer, form, **({} if form == "JPEG" else {"save_all": True, "append_images": [blue, red]}))
    found = decode(buffer.getvalue(), LIMIT)
    assert found.pages == (1 if form == "JPEG" else 3)
    assert np.abs(found.pixels[0, 0].astype(int) - [255, 0, 0]).max() <= 2


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("kind", [b"iCCP", b"zTXt"])
def test_a_png_with_a_large_text_chunk_is_read(kind: bytes) -> None:
    buffer = io.BytesIO()
    Image.fromarray(ramp()).save(buffer, format="PNG")
    plain = buffer.getvalue()
    large = chunk(kind, b"name\0\0" + zlib.compress(bytes(3 << 20)))
    assert np.array_equal(decode(plain[:33] + large + plain[33:], LIMIT).pixels, ramp())


def test_truncated_files_are_refused_unless_accepted() -> None:
    whole = jpeg(3, (200, 150))
    assert failure(whole[:-200])[0] == "corrupt"
    accepted = decode(whole[:-200], LIMIT, "accept").pixels
    assert np.array_equal(accepted[:64], decode(whole, LIMIT).pixels[:64])
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format="PNG")
    assert failure(buffer.getvalue()[:-400])[0] == "corrupt"
    assert np.array_equal(decode(buffer.getvalue()[:-400], LIMIT, "accept").pixels[:4], noise[:4])
    assert failure(b"<html>", truncated="accept")[0] == "not_an_image"


@pytest.mark.parametrize(
    ("data", "kind", "name"),
    [
        (b"8BPS\0\1" + bytes(40), "unsupported", "Photoshop"),
        (b"v/1\1" + bytes(40), "unsupported", "OpenEXR"),
        (bytes(128) + b"DICM" + bytes(40), "unsupported", "DICOM"),
        (b"P6\n4 4\n255\n" + bytes(48), "unsupported", "Netpbm"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported", "SVG"),
        (b"\0\0\0\x18ftypcrx " + bytes(40), "unsupported", "camera raw"),
        (b"\xff\xd8\xff\xe0\0\4ab", "corrupt", "JPEG"),
        (b"\x89PNG\r\n\x1a\n" + bytes(9), "corrupt", "PNG"),
        (b"II*\0\x08\0\0\0", "corrupt", "TIFF"),
        (b"hello, world", "not_an_image", "hello"),
    ],
)
def test_files_that_cannot_be_opened_are_named(data: bytes, kind: str, name: str) -> None:
    found, message = failure(data)
    assert found == kind
    assert name in message


def test_formats_without_their_library_are_skipped_with_the_remedy() -> None:
    core = (".jpg", ".png")
    assert why_left_out(".heic", core) == "HEIF is not read here: pip install 'cliper[formats]'"
    assert "JXL is not read here" in why_left_out(".jxl", core)
    assert "pillow>=11.3" in why_left_out(".avif", core)
    assert sniff((INPUTS / "heic.heic").read_bytes()) == "HEIF"
    assert {"AVIF", "HEIF", "JXL", "JPEG2000"} <= set(FORMATS)


def test_the_option_reaches_the_actor(tmp_path: Path) -> None:
    (tmp_path / "cut.jpg").write_bytes(jpeg(3, (200, 150))[:-200])
    for truncated, status in (("refuse", "failed"), ("accept", "ok")):
        [row] = rows_of(label_small(tmp_path, tmp_path / truncated, input={"truncated": truncated}))
        assert row["status"] == status
