"""Images and masks of a report page as data URIs, in the colors of the palette."""

import base64
import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from cliper.pipeline.run.masks import palette

COLOURS = np.array(palette(), dtype=np.uint8).reshape(256, 3)
OVERLAY_SIDE = 400  # pixels, the longer side in the page


def picture(pixels: npt.NDArray[np.uint8], side: int = OVERLAY_SIDE) -> str:
    """RGB uint8 [H, W, 3] as a WebP data URI, its longer side at most `side` pixels."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def overlay(
    pixels: npt.NDArray[np.uint8], labels: npt.NDArray[Any], opacity: float = 0.6
) -> npt.NDArray[np.uint8]:
    """Labels [H, W] in the palette's colors over a desaturated RGB image [H, W, 3]; `opacity` of them: 0 to 1."""
    grey = pixels.mean(axis=2, keepdims=True) * 0.8 + 40
    mixed = (1 - opacity) * grey + opacity * COLOURS[palette_index(labels)]
    return mixed.clip(0, 255).astype(np.uint8)


def palette_index(labels: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """The palette entry of every label, uint8; labels from 256 on repeat the colors, except that of 0."""
    wide = labels.astype(np.int64)
    return np.where(wide == 0, 0, (wide - 1) % 255 + 1).astype(np.uint8)


def mask_layer(labels: npt.NDArray[Any], side: int = OVERLAY_SIDE) -> str:
    """Labels [H, W] as a palette PNG data URI, its longer side at most `side` pixels; label 0 is transparent."""
    image = Image.fromarray(palette_index(labels))
    scale = min(1.0, side / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.NEAREST)
    image.putpalette(palette())
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", transparency=0, optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def colour(label: int) -> str:
    """The CSS color of a label."""
    return "rgb({},{},{})".format(*COLOURS[int(palette_index(np.array(label)))])
