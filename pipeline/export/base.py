"""The exporter interface."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from cliper.model.classes import ignore_value
from cliper.pipeline.corpus.decode import upright
from cliper.pipeline.errors import ExportError
from cliper.pipeline.export.folder import Folder
from cliper.pipeline.run.masks import encode_png, palette, unpack_mask
from cliper.pipeline.run.rows import RowFilter

_COLOURS = np.array(palette()).reshape(256, 3)

_NOT_IN_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

Record = Mapping[str, Any]  # an image's data for `finish`; plain JSON


@dataclass(frozen=True)
class Plan:
    """Settings of an export, the same for every shard and worker."""

    format: str
    run_uri: str
    fingerprint: str
    class_names: Sequence[str]  # of labels 1, 2, ...
    keep: RowFilter
    images: bool  # copy the source images too
    val_share: float  # of the images that go into the validation split
    clashing: frozenset[int] = field(default=frozenset(), repr=False)  # see names.py

    @property
    def ignore_value(self) -> int:
        """The label that is never written: 255, or 65535 above 254 classes."""
        return ignore_value(len(self.class_names))

    def split(self, image_id: str) -> str:
        """`train` or `val`; depends on the id alone."""
        draw = int.from_bytes(hashlib.blake2b(image_id.encode(), digest_size=8).digest(), "big") / 2**64
        return "val" if draw < self.val_share else "train"


@dataclass(frozen=True)
class Item:
    """One image to export. `name` is its file name without extension (names.py)."""

    row: Mapping[str, Any]  # all columns of the run
    name: str
    image: bytes | None = None  # the copied image file, in the mask's grid; None if images are not copied
    image_ending: str = ""  # of `image`, e.g. .jpg
    as_seen: bool = False  # the format's tools turn images by their EXIF orientation, so masks are turned too

    @property
    def image_id(self) -> str:
        """Column `image_id` of the row."""
        found: str = self.row["image_id"]
        return found

    @property
    def uri(self) -> str:
        """The URI that the run read the image from."""
        found: str = self.row["uri"]
        return found

    @property
    def orientation(self) -> int:
        """The EXIF orientation applied to `labels`: 1 for none."""
        return (self.row["orientation"] or 1) if self.as_seen and self.image is None else 1

    @cached_property
    def labels(self) -> np.ndarray:
        """The label map, uint8 or uint16 [H, W]."""
        stored = unpack_mask(self.row)
        return stored if self.orientation == 1 else np.ascontiguousarray(upright(stored, self.orientation))

    @property
    def png(self) -> bytes:
        """The label map as PNG: VOC's palette for uint8, 16-bit grayscale for uint16."""
        if self.row["mask_codec"] == "png" and self.orientation == 1:
            stored: bytes = self.row["mask"]["bytes"]
            return stored
        return encode_png(self.labels)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of `labels`."""
        height, width = self.row["height"], self.row["width"]
        return (height, width) if self.orientation < 5 else (width, height)


def colour(label: int) -> tuple[int, int, int]:
    """VOC's color (r, g, b) of a label; from 256 on the colors repeat, except that of the background."""
    red, green, blue = _COLOURS[(label - 1) % 255 + 1 if label else 0].tolist()
    return red, green, blue


def hex_colour(label: int) -> str:
    """VOC's color of a label as #rrggbb."""
    return "#" + "".join(f"{part:02x}" for part in colour(label))


class Records:
    """The records of all exported images, in shard order; each iteration reads the files again."""

    def __init__(self, read: Callable[[], Iterator[Record]]) -> None:
        self._read = read

    def __iter__(self) -> Iterator[Record]:
        return self._read()


@dataclass(frozen=True)
class Exporter:
    """A format. `shard` writes the files of one shard and yields one record per image; `finish` writes the rest.

    `shard` may run again for the same shard, in any order and process: its output must depend on its items
    alone, including file names. Every record holds `image_id` and `name`.
    """

    shard: Callable[[Iterable[Item], Folder, Plan, int], Iterator[Record]]
    finish: Callable[[Records, Folder, Plan], None]
    image_formats: tuple[str, ...] = (
        "PNG",
        "JPEG",
        "WEBP",
        "BMP",
    )  # copied unchanged; others become the first
    splits: bool = False  # into train and val
    as_seen: bool = False  # see Item
    needs_images: bool = False  # trainers of this format need the image files next to the masks
    keeps_failed: bool = False  # rows without a mask can be held
    needs: tuple[str, ...] = ()  # modules of the extra `export`
    check: Callable[[Plan], None] = lambda plan: None  # raises ExportError if the format cannot represent the run


def refuse_unprintable(text: str, what: str) -> None:
    """Raise ExportError for a character that XML 1.0 cannot represent."""
    found = _NOT_IN_XML.search(text)
    if found is not None:
        raise ExportError(
            f"the {what} {text!r} holds {found[0]!r}, which XML cannot represent; choose another format"
        )
