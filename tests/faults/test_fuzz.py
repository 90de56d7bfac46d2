"""Damaged and random inputs: any bytes raise only CliperErrors.

CLIPER_FUZZ is the number of examples per test: a few hundred in CI, 10,000 in `make faults`.
"""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cliper.model.classes import ClassList
from cliper.model.errors import CliperError
from cliper.pipeline.config import JobConfig, load_classes, load_config
from cliper.pipeline.corpus.decode import decode
from cliper.pipeline.corpus.sources import Entry, list_entries
from cliper.pipeline.errors import ImageError
from cliper.pipeline.storage.backend import Storage
from tests.support.fakes import jpeg

EXAMPLES = int(os.environ.get("CLIPER_FUZZ", "200"))
MAX_PIXELS = 100_000

fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def seeds() -> dict[str, list[bytes]]:
    """Small valid images of every format, pixel type and compression that changes the decoder's path."""
    with Image.open(io.BytesIO(jpeg(0))) as photo:
        rgb = photo.convert("RGB")
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker" * 20
    deep = Image.fromarray((np.arange(48 * 64, dtype=np.uint16) * 21).reshape(48, 64))
    return {
        "JPEG": [
            encoded(rgb, "JPEG", exif=exif),
            encoded(rgb, "JPEG", progressive=True, icc_profile=b"x" * 200),
            encoded(rgb.convert("CMYK"), "JPEG"),
            encoded(rgb.convert("L"), "JPEG", comment=b"y" * 50),
        ],
        "PNG": [
            encoded(rgb, "PNG", exif=exif),
            encoded(rgb.convert("P"), "PNG", transparency=3),
            encoded(rgb.convert("RGBA"), "PNG"),
            encoded(deep, "PNG"),
            encoded(rgb.convert("1"), "PNG"),
        ],
        "WEBP": [
            encoded(rgb, "WEBP", exif=exif),
            encoded(rgb.convert("RGBA"), "WEBP", lossless=True),
            encoded(rgb, "WEBP", save_all=True, append_images=[rgb.rotate(90)]),
        ],
        "TIFF": [
            encoded(rgb, "TIFF", exif=exif),
            *(encoded(rgb, "TIFF", compression=name) for name in ("tiff_lzw", "jpeg", "tiff_deflate", "packbits")),
            encoded(rgb.convert("CMYK"), "TIFF"),
            encoded(deep, "TIFF"),
            encoded(rgb.convert("1"), "TIFF", compression="group4"),
        ],
        "BMP": [encoded(rgb, "BMP"), encoded(rgb.convert("P"), "BMP"), encoded(rgb.convert("1"), "BMP")],
        "GIF": [
            encoded(rgb.convert("P"), "GIF"),
            encoded(rgb.convert("P"), "GIF", save_all=True, append_images=[rgb.rotate(90).convert("P")]),
        ],
    }


SEEDS = seeds()
INTERESTING = [0x00, 0x01, 0x7F, 0x80, 0xFF]


@st.composite
def damaged(draw: st.DrawFn, kind: str) -> bytes:
    """A valid image with bytes changed (often in its head), runs removed or repeated, and its end cut off."""
    data = bytearray(draw(st.sampled_from(SEEDS[kind])))
    for _ in range(draw(st.integers(1, 8))):
        end = draw(st.sampled_from([64, 512, len(data)]))
        place = draw(st.integers(0, max(1, min(end, len(data))) - 1))
        action = draw(st.sampled_from(["byte", "byte", "byte", "word", "remove", "repeat", "cut"]))
        if action == "byte":
            data[place : place + 1] = [draw(st.sampled_from(INTERESTING) | st.integers(0, 255))]
        elif action == "word":
            data[place : place + 4] = draw(st.binary(min_size=4, max_size=4))
        elif action == "remove":
            del data[place : place + draw(st.integers(1, 40))]
        elif action == "repeat":
            data[place:place] = data[place : place + draw(st.integers(1, 40))]
        elif draw(st.booleans()):
            del data[place:]
    return bytes(data)


@pytest.mark.filterwarnings("ignore:::PIL")
@pytest.mark.parametrize("kind", sorted(SEEDS))
@fuzz
@given(data=st.data())
def test_damaged_images_decode_or_raise_an_image_error(kind: str, data: st.DataObject) -> None:
    try:
        found = decode(data.draw(damaged(kind)), MAX_PIXELS)
    except ImageError as error:
        assert error.kind in {"empty", "not_an_image", "oversized", "corrupt", "unsupported"}
        assert len(str(error)) < 10_000
        return
    assert found.pixels.dtype == np.uint8
    assert found.pixels.ndim == 3
    assert found.pixels.shape[2] == 3
    assert found.width * found.height <= MAX_PIXELS
    assert sorted(found.pixels.shape[:2]) == sorted((found.height, found.width))


SEPARATORS = ["\n", "\r\n", "\r", ",", '"', ";", "=", "|", "#", "\t", " ", "\0", "\ufeff", "\u2028", "'"]
WORDS = ["image_id", "uri", "a.jpg", "s3://b/ü.jpg", "/x", "cat", "dog = a dog | puppy", "-1", "🐕", "../../x"]
text_file = st.lists(st.sampled_from(SEPARATORS + WORDS) | st.text(max_size=6), max_size=40).map(
    lambda parts: "".join(parts).encode("utf-8", errors="surrogatepass")
) | st.binary(max_size=120)
csv_file = text_file | text_file.map(lambda rest: b"image_id,uri\n" + rest) | text_file.map(lambda r: b"uri\n" + r)


@pytest.mark.parametrize("ending", ["csv", "txt", "parquet", "tar"])
@fuzz
@given(content=csv_file)
def test_lists_are_entries_or_a_message(ending: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"list.{ending}"
    path.write_bytes(content)
    try:
        entries = list(list_entries(Storage(), str(path), JobConfig().input))
    except CliperError as error:
        assert str(path) in str(error)
        return
    assert all(isinstance(entry, Entry) and entry.image_id and entry.uri for entry in entries)


@fuzz
@given(content=text_file)
def test_class_files_are_classes_or_a_message(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_bytes(content)
    try:
        classes = load_classes(str(path))
    except CliperError as error:
        assert str(path) in str(error)
        return
    assert isinstance(classes, ClassList)
    assert len(set(classes.names)) == len(classes.words) == len(classes) > 0
    assert all(word for words in classes.words for word in words)


def keys_of(settings_class: type) -> list[str]:
    fields = settings_class.model_fields  # type: ignore[attr-defined]
    inner = [field.annotation for field in fields.values() if hasattr(field.annotation, "model_fields")]
    return [*fields, *(key for annotation in inner for key in keys_of(annotation))]


KEYS = sorted(set(keys_of(JobConfig)))
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(KEYS)
mappings = st.sampled_from(KEYS) | scalars
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(mappings, inner, max_size=4),
    max_leaves=8,
)
SYNTAX = [*":-{}[],&*!|>%@`#?~", "<<", "!!python/object:os.system", "\n", "  "]
yaml_parts = st.sampled_from(KEYS) | st.sampled_from(SYNTAX) | st.text(max_size=3)
yaml_text = st.lists(yaml_parts, max_size=25).map("".join)


@fuzz
@given(content=values)
def test_random_settings_are_a_config_or_a_message(content: object, tmp_path: Path) -> None:
    check_config(yaml.safe_dump(content, allow_unicode=True).encode("utf-8", errors="surrogatepass"), tmp_path)


@fuzz
@given(content=yaml_text.map(lambda text: text.encode("utf-8", errors="surrogatepass")) | st.binary(max_size=60))
def test_random_yaml_is_a_config_or_a_message(content: bytes, tmp_path: Path) -> None:
    check_config(content, tmp_path)


def check_config(content: bytes, folder: Path) -> None:
    path = folder / "config.yaml"
    path.write_bytes(content)
    try:
        assert isinstance(load_config(str(path)), JobConfig)
    except CliperError as error:
        assert str(path) in str(error)
