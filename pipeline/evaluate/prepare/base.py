"""Shared parts of the dataset families: samples, and checks whose messages name the remedy."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from cliper.pipeline.errors import DatasetError

Labels = npt.NDArray[Any]  # uint8 or uint16 [H, W]

IGNORE = 255  # of all eight benchmarks, which have at most 171 classes


@dataclass(frozen=True)
class Sample:
    """One image and a function that returns its ground truth.

    `truth` returns uint8 or uint16 [H, W]: 0 = background, k = class k of the class list, 255 = not counted.
    `box` (left, top, right, bottom) crops the image; `truth` is already cropped.
    """

    image_id: str
    image: Path
    truth: Callable[[], Labels]
    box: tuple[int, int, int, int] | None = None


def need_folder(root: Path, options: Sequence[str], what: str, where: str) -> Path:
    """Return the first of `options` below `root` that is a folder. Raises DatasetError."""
    for option in options:
        if (root / option).is_dir():
            return root / option
    found = ", ".join(sorted(p.name for p in root.iterdir())[:8]) if root.is_dir() else "no such folder"
    raise DatasetError(
        f"{what}: expected the folder {' or '.join(options)} in {root}; "
        f"found: {found or 'nothing'}. Get it: {where}"
    )


def need_file(path: Path, what: str, where: str) -> Path:
    """Return `path` if it is a file. Raises DatasetError."""
    if not path.is_file():
        raise DatasetError(f"{what}: {path} does not exist. Get it: {where}")
    return path


def read_list(path: Path) -> list[str]:
    """The image names of a split file, one a line. Raises DatasetError if there are none."""
    names = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not names:
        raise DatasetError(f"{path} names no images")
    return names


def need_files(paths: Iterable[Path], what: str, where: str) -> list[Path]:
    """Return `paths` if all of them are files. Raises DatasetError, which counts and names the missing ones."""
    wanted = list(paths)
    missing = [path for path in wanted if not path.is_file()]
    if missing:
        raise DatasetError(
            f"{what}: {len(missing)} of {len(wanted)} files are missing in {missing[0].parent}, "
            f"e.g. {missing[0].name}. Get them: {where}"
        )
    return wanted


def read_labels(path: Path) -> Labels:
    """Read a label image of one channel (palette indices, 8- or 16-bit grayscale): uint8 or uint16 [H, W].

    Raises DatasetError for a color image or an unreadable file.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L", "I;16", "I"):
                raise DatasetError(
                    f"{path} is a {image.mode} image; labels need one channel of class numbers "
                    "(a palette or grayscale PNG, not a color image)"
                )
            labels = np.asarray(image)
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error}") from error
    return labels if labels.dtype == np.uint8 else labels.astype(np.uint16)


def lookup(mapping: dict[int, int], size: int = 256, rest: int = IGNORE) -> npt.NDArray[np.uint8]:
    """A table [size] that maps `mapping`'s keys to its values and everything else to `rest`."""
    table = np.full(size, rest, dtype=np.uint8)
    for source, target in mapping.items():
        table[source] = target
    return table
