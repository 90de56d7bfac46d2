"""Images as Python users hold them: paths, addresses, bytes, Pillow images, arrays and tensors."""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cliper.pipeline.corpus.decode import decode, exif_orientation, to_rgb, upright
from cliper.pipeline.corpus.load import MOST_BYTES
from cliper.pipeline.errors import ImageError, InputError
from cliper.pipeline.storage.backend import Storage
from cliper.pipeline.storage.refusals import explain
from cliper.pipeline.storage.uris import absolute, is_local

UNNAMED = "image"  # the id of an image that has no file name
_KINDS = "a path or address, bytes of a file, a PIL image, an array [H, W, 3] or a tensor [3, H, W]"


@dataclass(frozen=True)
class Opened:
    """An image as the model sees it, and how its file stores it."""

    pixels: np.ndarray  # uint8 [h, w, 3], RGB, upright
    orientation: int  # EXIF: 1 (upright) to 8
    image_id: str  # the file's name, or `UNNAMED`


def open_image(source: Any, storage: Storage, max_pixels: int) -> Opened:
    """Read an image: a path, an http(s) or bucket address, a file's bytes, a PIL image, an array or a tensor.

    Arrays are [H, W, 3], [H, W, 4] or gray [H, W]; tensors [3, H, W] or [1, H, W]; of uint8, or of floats from 0
    to 1. Raises InputError that names the image and the problem.
    """
    name = _name(source)
    try:
        if isinstance(source, str | PathLike):
            source = _read(str(source), storage)
        if isinstance(source, bytes):
            found = decode(source, max_pixels)
            return Opened(found.pixels, found.orientation, name)
        if isinstance(source, Image.Image):
            orientation = exif_orientation(source)
            return Opened(np.ascontiguousarray(upright(to_rgb(source), orientation)), orientation, name)
    except ImageError as error:
        raise InputError(f"{name} is not an image that can be read: {error.kind}, {error}") from error
    return Opened(_from_array(source), 1, name)


def _name(source: Any) -> str:
    if isinstance(source, str) and "://" in source:
        return source.partition("?")[0].rstrip("/").rpartition("/")[2] or UNNAMED
    return Path(source).name if isinstance(source, str | PathLike) else UNNAMED


def _read(uri: str, storage: Storage) -> bytes:
    if is_local(uri) and Path(uri).is_dir():
        raise InputError(f"{uri} is a folder; give a list of its images, or label it with 'cliper label'")
    [found] = storage.read_many([absolute(uri)], [None], MOST_BYTES)
    if isinstance(found, FileNotFoundError):
        raise InputError(f"there is no image {uri}") from found
    if isinstance(found, Exception):
        raise InputError(f"{uri} cannot be read: {explain(found)}") from found
    return found


def _from_array(source: Any) -> np.ndarray:
    """Uint8 [H, W, 3] of an array, or of a tensor with its channels first."""
    if hasattr(source, "detach"):  # a tensor, without importing torch
        source = source.detach().cpu().numpy()
        if source.ndim == 3:
            source = np.moveaxis(source, 0, -1)
    if not isinstance(source, np.ndarray):
        raise InputError(f"an image is {_KINDS}, not {type(source).__name__}")
    if source.ndim == 4:
        raise InputError(f"{source.shape} is a batch; give a list of images: model(list(batch))")
    grid = np.repeat(source[..., None], 3, axis=2) if source.ndim == 2 else source
    if grid.ndim != 3 or 0 in grid.shape:
        raise InputError(f"an image is {_KINDS}; this array is {source.shape}")
    if grid.shape[2] not in (1, 3, 4):
        raise InputError(
            f"an image has 1, 3 or 4 channels: arrays [H, W, 3], tensors [3, H, W]; not {grid.shape[2]}"
        )
    grid = _as_bytes(grid)
    if grid.shape[2] == 4:
        return np.ascontiguousarray(to_rgb(Image.fromarray(grid)))
    return np.ascontiguousarray(np.repeat(grid, 3, axis=2) if grid.shape[2] == 1 else grid)


def _as_bytes(grid: np.ndarray) -> np.ndarray:
    if grid.dtype == np.uint8:
        return grid
    if grid.dtype == bool:
        return grid.astype(np.uint8) * 255
    if grid.dtype.kind != "f" or not np.isfinite(grid).all() or grid.min() < 0 or grid.max() > 1:
        limits = f" from {grid.min():g} to {grid.max():g}" if grid.dtype.kind in "fiu" else ""
        raise InputError(f"pixels are uint8, or floats from 0 to 1; these are {grid.dtype}{limits}")
    return np.rint(grid * 255).astype(np.uint8)
