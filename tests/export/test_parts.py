"""The pieces of exports: names, brush code, polygons, RLE, pictures. Round trips hold for any mask."""

import io
from pathlib import Path
from urllib.parse import unquote

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageOps

from cliper.pipeline.errors import ImageError, StorageError
from cliper.pipeline.export.brush import decode_brush, encode_brush
from cliper.pipeline.export.formats.coco import segment_rles
from cliper.pipeline.export.formats.cvat import region_rle
from cliper.pipeline.export.formats.label_studio import image_url
from cliper.pipeline.export.formats.yolo import lines_of
from cliper.pipeline.export.images import in_mask_grid, without_orientation
from cliper.pipeline.export.names import MAX_BYTES, clashing_names, file_name
from cliper.pipeline.export.polygons import outlines, polygons, regions
from cliper.pipeline.storage.backend import Storage
from tests.support.export_runs import HARD_IDS

sides = st.tuples(st.integers(1, 24), st.integers(1, 24))
masks = sides.flatmap(lambda shape: arrays(np.bool_, shape))
label_maps = sides.flatmap(lambda shape: arrays(np.uint16, shape, elements=st.sampled_from([0, 1, 2, 300])))


def filled(polygon: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    canvas = np.zeros(shape, np.uint8)
    cv2.fillPoly(canvas, [polygon.astype(np.int32)], color=1)
    return canvas.astype(bool)


@settings(deadline=None, max_examples=300)
@given(masks)
def test_polygons_fill_to_the_mask_again(mask: np.ndarray) -> None:
    found = np.zeros(mask.shape, int)
    for polygon in regions(mask):
        assert len(polygon) >= 3
        found += filled(polygon, mask.shape)
    assert np.array_equal(found, mask), "each pixel once, and none besides"


def test_polygons_of_nested_rings_and_of_noise() -> None:
    rings = np.hypot(*np.mgrid[-60:61, -60:61]).astype(int) % 6 < 3
    noise = np.random.default_rng(1).random((150, 200)) < 0.6
    comb = np.ones((40, 60), bool)
    comb[2:-2:3, 2:-2:2] = False  # many holes in each row and column
    for mask in (rings, noise, comb):
        found = sum(filled(polygon, mask.shape).astype(int) for polygon in regions(mask))
        assert np.array_equal(found, mask)


@settings(deadline=None, max_examples=100)
@given(label_maps)
def test_outlines_fill_to_the_label_map_again_by_cocos_rule(labels: np.ndarray) -> None:
    from pycocotools import mask as coco

    found = np.zeros(labels.shape, int)
    for label, points in outlines(labels):
        [rle] = coco.frPyObjects([points.ravel().astype(float).tolist()], *labels.shape)
        found += coco.decode(rle).astype(int) * label
    assert np.array_equal(found, labels)


def test_polygons_have_few_vertices_a_hole() -> None:
    """10,000 holes, each joined to the outline once."""
    mask = np.ones((302, 302), bool)
    mask[1:-2:3, 1:-2:3] = False
    [polygon] = regions(mask)
    assert 4 * (~mask).sum() < len(polygon) < 8 * (~mask).sum()


def test_simplified_polygons_keep_holes_and_most_of_the_mask() -> None:
    rings = np.hypot(*np.mgrid[-60:61, -60:61]).astype(int) % 24 < 12
    exact = sum(len(points) for points in regions(rings))
    for tolerance, least in ((1.0, 0.9), (2.0, 0.8)):
        lines = list(regions(rings, tolerance))
        found = sum(filled(points, rings.shape).astype(int) for points in lines) > 0
        assert (found & rings).sum() / (found | rings).sum() > least
        assert sum(map(len, lines)) < exact / 2


@pytest.mark.parametrize("scale", [0.5, 1.7, 3.0])
def test_resized_polygons_stay_within_a_pixel_of_the_mask(scale: float) -> None:
    """The bound that docs/EXPORT.md states: a pixel before and one after resizing, along outlines and edges."""
    labels = (np.hypot(*np.mgrid[-60:61, -80:81]).astype(int) // 25).astype(np.uint8)
    height, width = (round(side * scale) for side in labels.shape)
    found = np.zeros((height, width), np.uint8)
    for line in lines_of(polygons(labels), labels.shape):
        number, *values = line.split()
        points = np.array(values, float).reshape(-1, 2) * (width, height)
        found[filled(points, found.shape)] = int(number) + 1
    resized = cv2.resize(labels, (width, height), interpolation=cv2.INTER_NEAREST)
    reach = int(np.ceil(scale)) + 1
    framed = np.pad(resized, reach, constant_values=255)
    window = np.ones((2 * reach + 1,) * 2, np.uint8)
    flat = (cv2.erode(framed, window) == cv2.dilate(framed, window))[reach:-reach, reach:-reach]
    assert np.array_equal(found[flat], resized[flat])
    assert flat.mean() > 0.5


@settings(deadline=None)
@given(masks)
@example(np.zeros((1, 1), bool))
@example(np.ones((300, 400), bool))  # runs longer than one block of 65,536 words
def test_brush_round_trip(mask: np.ndarray) -> None:
    assert np.array_equal(decode_brush(encode_brush(mask), *mask.shape), mask)


@settings(deadline=None, max_examples=30)
@given(masks)
def test_brush_is_what_label_studio_reads_and_writes(mask: np.ndarray) -> None:
    """Also with literal words, which its encoder writes for lone values: here colours that differ by pixel."""
    from label_studio_sdk.converter import brush

    def padded(
        bits: str, n: int = 8
    ) -> list[int]:  # the editor pads the last byte on the right, this port does not
        return [int(bits[i : i + n].ljust(n, "0"), 2) for i in range(0, len(bits), n)]

    height, width = mask.shape
    assert np.array_equal(brush.decode_rle(encode_brush(mask)).reshape(height, width, 4)[..., 3] > 0, mask)
    colours = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels = np.concatenate([colours, mask[..., None].astype(np.uint8) * 255], axis=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(brush, "bits2byte", padded)
        written = brush.encode_rle(pixels.ravel())
    assert np.array_equal(decode_brush(written, height, width), mask)


@pytest.mark.parametrize("cut", [1, 5, 9, 12])
def test_a_damaged_brush_is_refused(cut: int) -> None:
    rle = encode_brush(np.random.default_rng(0).random((20, 20)) < 0.5)
    with pytest.raises(ValueError, match="ends too early"):
        decode_brush(rle[:cut], 20, 20)
    with pytest.raises(ValueError, match="holds 1600 words, a mask of 21 x 20 has 1680"):
        decode_brush(rle, 20, 21)


@settings(deadline=None)
@given(label_maps)
def test_segment_rles_are_pycocotools_own(labels: np.ndarray) -> None:
    from pycocotools import mask as coco

    found = segment_rles(labels)
    assert set(found) == set(np.unique(labels).tolist()) - {0}
    for label, rle in found.items():
        assert rle == coco.encode(np.asfortranarray(labels == label))


@settings(deadline=None)
@given(masks)
def test_region_rle_alternates_from_outside(mask: np.ndarray) -> None:
    counts = region_rle(mask)
    assert np.array_equal(np.repeat(np.arange(len(counts)) % 2, counts), mask.ravel())
    assert all(counts[1:])


def safe(name: str) -> bool:
    forbidden = set('/\\:*?"<>|.\0 \n')
    return bool(name) and not forbidden & set(name) and len(name.encode()) <= MAX_BYTES


@settings(deadline=None, max_examples=100)
@given(st.lists(st.text(max_size=90) | st.sampled_from(HARD_IDS), unique=True, max_size=12))
@example(HARD_IDS)
@example(["", ".", "..", "../x", "a/../b", "%2E", ".png", "CON", "con", "lpt1.JPG", "ß", "SS", "İ"])
def test_names_are_safe_and_of_one_image(ids: list[str]) -> None:
    clashing = clashing_names([ids])
    names = [file_name(image_id, clashing) for image_id in ids]
    assert all(map(safe, names)), names
    assert len({name.casefold() for name in names}) == len(ids)


@settings(deadline=None)
@given(st.text(min_size=1, max_size=40))
def test_a_name_without_a_hash_is_the_quoted_id(image_id: str) -> None:
    name = file_name(image_id)
    if "~" not in name:
        assert image_id.startswith(unquote(name))
        assert len(image_id) - len(unquote(name)) <= len(".jpeg")


def test_every_name_can_be_written(tmp_path: Path) -> None:
    clashing = clashing_names([HARD_IDS])
    for image_id in HARD_IDS:
        Storage().write(str(tmp_path / f"{file_name(image_id, clashing)}.png"), b"x")
    assert len(list(tmp_path.iterdir())) == len(HARD_IDS)
    assert file_name("写真/猫.jpg") == "写真%2F猫"
    assert file_name("../../etc/passwd") == "%2E%2E%2F%2E%2E%2Fetc%2Fpasswd"
    assert file_name("a.jpg", clashing_names([["a.jpg", "b.jpg"], ["A.png"]])).startswith("a~")
    assert file_name("b.jpg", clashing_names([["a.jpg", "b.jpg"], ["A.png"]])) == "b"


def picture(kind: str, orientation: int, mode: str = "RGB") -> bytes:
    image = Image.new(mode, (40, 24), "white")
    image.paste(Image.new(mode, (20, 12), "black"), (0, 0))
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "maker", orientation
    buffer = io.BytesIO()
    image.save(buffer, format=kind, exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("wanted", ["JPEG", "PNG"])
def test_images_lose_their_orientation_and_keep_their_grid(kind: str, orientation: int, wanted: str) -> None:
    data, ending = in_mask_grid(picture(kind, orientation), (wanted,), 10_000)
    assert ending == {"JPEG": ".jpg", "PNG": ".png"}[wanted]
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == wanted
        shown = np.array(ImageOps.exif_transpose(image).convert("L")) < 128
    assert shown.shape == (24, 40)
    assert np.array_equal(np.argwhere(shown).max(axis=0), [11, 19]), "dark at the top left"


def test_a_jpeg_is_not_reencoded() -> None:
    plain, turned = picture("JPEG", 1), picture("JPEG", 6)
    assert in_mask_grid(plain, ("JPEG",), 10_000) == (plain, ".jpg")
    reset, _ = in_mask_grid(turned, ("JPEG",), 10_000)
    assert len(reset) == len(turned)
    assert sum(a != b for a, b in zip(reset, turned, strict=True)) == 1
    with Image.open(io.BytesIO(reset)) as image:
        assert image.getexif()[0x010F] == "maker"


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=60), st.integers(0, 200))
def test_damaged_exif_never_breaks_the_copy(noise: bytes, place: int) -> None:
    data = picture("JPEG", 6)
    damaged = data[:place] + noise + data[place + len(noise) :]
    assert len(without_orientation(damaged)) == len(damaged)


def test_files_that_are_not_images_are_image_errors() -> None:
    with pytest.raises(ImageError):
        in_mask_grid(b"<html>", ("JPEG",), 10_000)


def test_urls_that_label_studio_can_load() -> None:
    assert image_url("s3://bucket/a b.jpg") == "s3://bucket/a b.jpg"
    assert image_url("https://host/x.jpg") == "https://host/x.jpg"
    assert image_url("/data/a b#1%2F.jpg") == "/data/local-files/?d=data/a%20b%231%252F.jpg"


def test_a_stream_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fill() -> None:
        with Storage().create(str(tmp_path / "file")) as handle:
            handle.write(b"half")
            raise KeyError("stopped")

    with pytest.raises(KeyError):
        fill()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "taken").write_text("a file where a folder must be")
    with pytest.raises(StorageError, match="taken/x"), Storage().create(str(tmp_path / "taken" / "x")):
        pass
