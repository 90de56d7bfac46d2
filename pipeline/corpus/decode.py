"""From a file's bytes to upright RGB pixels, and label maps back to the file's own pixel grid."""

import io
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from cliper.pipeline.corpus import tiff
from cliper.pipeline.corpus.bombs import refuse_bombs
from cliper.pipeline.corpus.formats import FORMATS, SUFFIXES, jpeg_kind, remedy, sniff
from cliper.pipeline.errors import ImageError

__all__ = [
    "FORMATS",
    "SUFFIXES",
    "Decoded",
    "decode",
    "exif_orientation",
    "pixels_claimed",
    "to_file_grid",
    "upright",
]

Truncated = Literal["refuse", "accept"]

_ORIENTATION_TAG = 0x0112
_LFS = b"version https://git-lfs.github.com/spec/"
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_TEXT = (b"iCCP", b"zTXt", b"iTXt", b"tEXt")


@dataclass(frozen=True)
class Decoded:
    """An image as the model sees it, and how its file stores it."""

    pixels: np.ndarray  # uint8 [h, w, 3], RGB, upright
    width: int  # of the file's pixel grid
    height: int
    orientation: int  # EXIF, 1 (upright) to 8
    pages: int = 1  # pages or frames of the file, without thumbnails; one of them is in `pixels`


def decode(data: bytes, max_pixels: int, truncated: Truncated = "refuse") -> Decoded:
    """Decode a file of one of FORMATS: the first frame of an animation, the full-resolution page of a TIFF.

    12- and 16-bit images keep their upper 8 bits; transparency is laid over white; EXIF orientation is applied.
    `truncated`: the treatment of a file whose last bytes are missing; "accept" fills the missing pixels with grey
    or black. Raises ImageError of kind `empty`, `not_an_image`, `unsupported` (an image, but of a kind that is not
    read), `oversized` (checked before any pixel is decoded) or `corrupt`.
    """
    if not data:
        raise ImageError("empty", "the file has no bytes")
    try:
        return _decode(data, max_pixels)
    except ImageError as error:
        if error.kind != "corrupt":
            raise
        bare = _without_text(data)
        if truncated == "accept":
            with _incomplete_files():
                return _decode(bare, max_pixels)
        if bare is data:
            raise
        return _decode(bare, max_pixels)


def _decode(data: bytes, max_pixels: int) -> Decoded:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            pages = tiff.pages(data) if image.format == "TIFF" else []
            page = _select_page(image, pages) if image.format == "TIFF" else None
            _check_size(image.size, max_pixels)
            refuse_bombs(data, image.width * image.height)
            orientation = exif_orientation(image)
            pixels = to_rgb(image, page)
            # Pillow's TIFF reader turns the image as it loads and then reports orientation 1; others leave it.
            pixels = np.ascontiguousarray(upright(pixels, exif_orientation(image)))
            height, width = pixels.shape[1::-1] if orientation >= 5 else pixels.shape[:2]
            return Decoded(pixels, width, height, orientation, sum(not p.reduced for p in pages) or _frames(image))
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError("oversized", str(error)) from error
    except UnidentifiedImageError as error:
        raise _unidentified(data) from error
    except MemoryError as error:
        raise ImageError("oversized", "the decoder ran out of memory") from error
    except Exception as error:  # Pillow's plugins raise nearly any type on damaged files
        raise ImageError("corrupt", f"{type(error).__name__}: {error}") from error


def _frames(image: Image.Image) -> int:
    """Frames of an animation, or pictures of an MPO; 1 if those behind the first cannot be counted."""
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception:  # damage behind the first frame
        return 1


def _select_page(image: Image.Image, pages: list[tiff.Page]) -> tiff.Page:
    """Turn a TIFF to the page to read, its layout checked."""
    page = tiff.full_page(pages)
    tiff.check_layout(page)
    if page.index:
        image.seek(page.index)
    return page


def _unidentified(data: bytes) -> ImageError:
    """Classify data that Pillow could not open: an unsupported kind of image, a damaged one, or no image."""
    name = sniff(data)
    if data.startswith(_LFS):
        return ImageError("not_an_image", "a Git LFS pointer, not the file: git lfs pull")
    if name is None:
        return ImageError("not_an_image", f"not one of {', '.join(FORMATS)}; begins with {data[:8]!r}")
    if name == "TIFF":
        return _unopened_tiff(data)
    kind = jpeg_kind(data) if name == "JPEG" else None
    if name in ("PNG", "GIF", "WebP", "JPEG") and kind is None:
        return ImageError("corrupt", f"begins like {name}, but its header cannot be read")
    reason = f" with {kind}" if kind and "bits" in kind else f", {kind}" if kind else ""
    return ImageError("unsupported", f"{name}{reason}: {remedy(name)}")


def _unopened_tiff(data: bytes) -> ImageError:
    try:
        page = tiff.full_page(tiff.pages(data))
        tiff.check_layout(page)
    except ImageError as error:
        return error
    except Exception:  # no page, or tags that cannot be unpacked
        return ImageError("corrupt", "begins like TIFF, but its directory cannot be read")
    return ImageError("unsupported", f"TIFF: samples of this layout are not read ({page}); convert to RGB")


def pixels_claimed(data: bytes) -> int:
    """Width times height as the header says, without decoding; 0 if it is no image."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.format == "TIFF":
                return max(page.width * page.height for page in tiff.pages(data))
            return image.width * image.height
    except KeyboardInterrupt:
        raise
    except BaseException:  # `decode` reports what is wrong; a panic of a decoder in Rust is no Exception
        return 0


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise ImageError(
            "oversized", f"{size[0]} x {size[1]} pixels; the limit is {max_pixels} (max_pixels in the config)"
        )


def to_rgb(image: Image.Image, page: tiff.Page | None = None) -> np.ndarray:
    """Pixels of any Pillow mode as uint8 [H, W, 3]; `page`: the tags of a TIFF."""
    if image.mode.startswith("I;16"):
        return _grey16(image, page)
    if image.mode in ("I", "F"):
        raise ImageError(
            "unsupported", f"{image.format} pixels of 32 bits have no agreed range; convert to 8 or 16"
        )
    if image.mode == "LAB":
        raise ImageError("unsupported", "Lab colours are not read; convert to RGB")
    if image.mode == "RGB" and max(_transparent_colour(image), default=0) > 0xFF:
        raise ImageError("unsupported", "16-bit RGB with a transparent colour; convert it to RGBA")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return np.asarray(image.convert("RGB"))


def _transparent_colour(image: Image.Image) -> tuple[int, ...]:
    colour = image.info.get("transparency")
    return colour if isinstance(colour, tuple) else ()


def _grey16(image: Image.Image, page: tiff.Page | None) -> np.ndarray:
    """12- or 16-bit grey as uint8 [H, W, 3]: the upper 8 bits of the range that the file names."""
    values = np.asarray(image).astype(np.int64)
    full = 0xFFFF if page is None else 2 ** page.bits[0] - 1
    top = full if page is None or values.max(initial=0) > page.top else page.top
    grey = values * 256 // (top + 1)
    if page is not None and page.photometric == 0:
        grey = 255 - grey
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey = np.where(values == transparent, 255, grey)
    return np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


_incomplete = threading.Lock()


@contextmanager
def _incomplete_files() -> Iterator[None]:
    """Pillow's switch for files whose end is missing. It is global, so one thread at a time sets it."""
    with _incomplete:
        before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


def _without_text(data: bytes) -> bytes:
    """A PNG without its text and colour profile, which Pillow refuses when they are large; else `data` itself."""
    if not data.startswith(_PNG):
        return data
    kept, place = [_PNG], len(_PNG)
    while place + 12 <= len(data):
        (size,) = struct.unpack(">I", data[place : place + 4])
        if data[place + 4 : place + 8] not in _PNG_TEXT:
            kept.append(data[place : place + 12 + size])
        place += 12 + size
    kept.append(data[place:])
    smaller = b"".join(kept)
    return smaller if len(smaller) < len(data) else data


def exif_orientation(image: Image.Image) -> int:
    """EXIF orientation of an opened image, 1 (upright) to 8; 1 if there is none or it is damaged."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged EXIF says nothing about the pixels, which are fine at this point
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def upright(grid: np.ndarray, orientation: int) -> np.ndarray:
    """Turn an array [H, W, ...] in the file's grid the way EXIF `orientation` says it is to be seen."""
    if orientation in (2, 4):
        return np.flip(grid, axis=1 if orientation == 2 else 0)
    if orientation in (5, 7):
        return np.swapaxes(grid if orientation == 5 else np.rot90(grid, 2), 0, 1)
    return np.rot90(grid, {1: 0, 3: 2, 6: 3, 8: 1}[orientation])


def to_file_grid(seen: np.ndarray, orientation: int) -> np.ndarray:
    """The inverse of `upright`: all orientations but the quarter turns undo themselves."""
    return upright(seen, {6: 8, 8: 6}.get(orientation, orientation))
