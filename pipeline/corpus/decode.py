"""From a file's bytes to upright RGB pixels, and label maps back to the file's own pixel grid."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from cliper.pipeline.errors import ImageError

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif")

_ORIENTATION_TAG = 0x0112


@dataclass(frozen=True)
class Decoded:
    """An image as the model sees it, and how its file stores it."""

    pixels: np.ndarray  # uint8 [h, w, 3], RGB, upright
    width: int  # of the file's pixel grid
    height: int
    orientation: int  # EXIF, 1 (upright) to 8


def decode(data: bytes, max_pixels: int) -> Decoded:
    """Decode JPEG, PNG, WebP, TIFF, BMP or the first frame of a GIF.

    16-bit images keep their upper 8 bits; transparency is laid over white; EXIF orientation is applied.
    Raises ImageError of kind `empty`, `not_an_image`, `oversized` (checked before any pixel is decoded),
    `corrupt` or `unsupported`.
    """
    if not data:
        raise ImageError("empty", "the file has no bytes")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image.size, max_pixels)
            orientation = exif_orientation(image)
            pixels = to_rgb(image)
            # Pillow's TIFF reader turns the image as it loads and then reports orientation 1; others leave it.
            pixels = np.ascontiguousarray(upright(pixels, exif_orientation(image)))
            height, width = pixels.shape[1::-1] if orientation >= 5 else pixels.shape[:2]
            return Decoded(pixels, width, height, orientation)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError("oversized", str(error)) from error
    except UnidentifiedImageError as error:
        raise ImageError("not_an_image", f"not one of {', '.join(FORMATS)}; begins with {data[:8]!r}") from error
    except MemoryError as error:
        raise ImageError("oversized", "the decoder ran out of memory") from error
    except Exception as error:  # Pillow's plugins raise nearly any type on damaged files
        raise ImageError("corrupt", f"{type(error).__name__}: {error}") from error


def pixels_claimed(data: bytes) -> int:
    """Width times height as the header says, without decoding; 0 for what is no image."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.width * image.height
    except Exception:  # `decode` will say what is wrong
        return 0


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise ImageError(
            "oversized", f"{size[0]} x {size[1]} pixels; the limit is {max_pixels} (max_pixels in the config)"
        )


def to_rgb(image: Image.Image) -> np.ndarray:
    """Pixels of any Pillow mode as uint8 [H, W, 3]."""
    if image.mode.startswith("I"):  # 16-bit grey, as I;16 or widened to 32 bits
        grey = np.clip(np.asarray(image) >> 8, 0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode == "F":
        raise ImageError("unsupported", "floating-point pixels have no agreed range; convert to 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return np.asarray(image.convert("RGB"))


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
