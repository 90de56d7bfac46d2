"""The exporter interface."""

import hashlib
import io
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from cliper.model.classes import ignore_value
from cliper.model.errors import ConfigError
from cliper.pipeline.corpus.decode import upright
from cliper.pipeline.errors import ExportError
from cliper.pipeline.export.folder import Folder
from cliper.pipeline.export.options import BACKGROUND, Options
from cliper.pipeline.export.regions import Edit
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
    run_classes: Sequence[str]  # of the run's labels 1, 2, ...
    keep: RowFilter
    images: bool  # copy the source images too
    options: Options = field(default_factory=Options)
    clashing: frozenset[int] = field(default=frozenset(), repr=False)  # see names.py

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the exported labels 1, 2, ..."""
        return self.options.names(self.run_classes)

    @property
    def id2label(self) -> dict[str, str]:
        """The names of all labels by number, background included, as JSON objects have them."""
        return {str(label): name for label, name in enumerate([BACKGROUND, *self.class_names])}

    @property
    def run_name(self) -> str:
        """The last part of the run's address."""
        return self.run_uri.rstrip("/").rpartition("/")[2]

    @property
    def ignore_value(self) -> int:
        """The label of pixels to ignore: 255, or 65535 above 254 classes."""
        return ignore_value(len(self.class_names))

    @cached_property
    def edit(self) -> Edit | None:
        """What the options change in label maps, if anything."""
        edit = Edit(self.options, tuple(self.run_classes))
        return edit if edit.changes else None

    @cached_property
    def things(self) -> set[int]:
        """The labels that have an annotation per connected region."""
        if not self.options.instances:
            return set()
        named = self.options.things
        return {label for label, name in enumerate(self.class_names, 1) if not named or name in named}

    def split(self, image_id: str) -> str:
        """`train`, `val` or `test`; depends on the id (its group) alone."""
        if image_id in self.options.listed:
            return self.options.listed[image_id]
        group = self.options.group(image_id)
        draw = int.from_bytes(hashlib.blake2b(group.encode(), digest_size=8).digest(), "big") / 2**64
        val = self.options.val_share or 0.0
        return "val" if draw < val else "test" if draw < val + self.options.test_share else "train"


@dataclass(frozen=True)
class Item:
    """One image to export. `name` is its file name without extension (names.py)."""

    row: Mapping[str, Any]  # all columns of the run
    name: str
    image: bytes | None = None  # the copied image file, in the mask's grid; None if images are not copied
    image_ending: str = ""  # of `image`, e.g. .jpg
    as_seen: bool = False  # the format's tools turn images by their EXIF orientation, so masks are turned too
    edit: Edit | None = None

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
        if self.edit is not None:
            stored = self.edit.labels(stored, self.row)
        return stored if self.orientation == 1 else np.ascontiguousarray(upright(stored, self.orientation))

    @property
    def png(self) -> bytes:
        """The label map as PNG: VOC's palette for uint8, 16-bit grayscale for uint16."""
        if self.row["mask_codec"] == "png" and self.orientation == 1 and self.edit is None:
            stored: bytes = self.row["mask"]["bytes"]
            return stored
        return encode_png(self.labels)

    @property
    def has_mask(self) -> bool:
        """Whether the row is not of a failed image."""
        return self.row["mask_codec"] is not None

    @property
    def metadata(self) -> dict[str, Any]:
        """The row without its mask; `classes` are those of `labels`."""
        row = self.row if self.edit is None or not self.has_mask else self.edit.row(self.row, self.labels)
        return {key: value for key, value in row.items() if key not in ("mask", "mask_codec")}

    @cached_property
    def scores(self) -> dict[int, float]:
        """The mean confidence of each label, 0 to 1."""
        entries = self.metadata["classes"] or ()
        return {one["class_id"]: round(one["mean_confidence"] or 0.0, 4) for one in entries}

    def record(self, plan: Plan) -> dict[str, Any]:
        """The members that every record has."""
        return {
            "image_id": self.image_id,
            "name": self.name,
            "uri": self.uri,
            "split": plan.split(self.image_id),
        }

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
    )  # are copied unchanged; others become the first
    val_share: float | None = None  # the default of a format with splits (train, val, test); None: it has none
    instances: bool = False  # options.instances has a meaning
    polygons: bool = False  # options.simplify has a meaning
    ignores: bool = False  # options.ignore_below has a meaning: masks with an ignore value
    as_seen: bool = False  # see Item
    needs_images: bool = False  # trainers of this format need the image files next to the masks
    keeps_failed: bool = False  # rows without a mask can be held
    needs: tuple[str, ...] = ()  # modules of the extra `export`
    check: Callable[[Plan], None] = lambda plan: None  # raises ExportError if the format cannot represent the run
    notes: Callable[[Plan], Sequence[str]] = lambda plan: ()  # printed after the export

    def refuse_other_options(self, name: str, options: Options) -> None:
        """Raise ConfigError for an option that has no meaning in this format."""
        given = {
            "--val-share, --test-share, --split-by and --split-list": (
                self.val_share is None
                and bool(options.val_share or options.test_share or options.listed or options.split_by != "image")
            ),
            "--instances": options.instances and not self.instances,
            "--simplify": bool(options.simplify) and not self.polygons,
            "--ignore-below": options.ignore_below is not None and not self.ignores,
            "--segmentation": options.segmentation != "rle" and name != "coco",
        }
        for option, refused in given.items():
            if refused:
                raise ConfigError(f"the format {name} has no {option}; docs/EXPORT.md lists the formats that do")


def plain_png(pixels: np.ndarray) -> bytes:
    """A PNG without a palette: grayscale of 8 or 16 bits of [H, W], RGB of uint8 [H, W, 3].

    For labels, if readers turn a palette into colors.
    """
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return buffer.getvalue()


def require_8_bits(plan: Plan) -> None:
    """Raise ExportError for more classes than a mask of 8 bits holds next to background and the ignore value."""
    count = len(plan.class_names)
    if count > 254:
        raise ExportError(f"{plan.format} holds 254 classes in 8 bits, not {count}; use --rename or --drop")


def require_printable_names(plan: Plan) -> None:
    """Raise ExportError for a class name that XML 1.0 cannot represent."""
    for name in plan.class_names:
        refuse_unprintable(name, "class name")


def refuse_unprintable(text: str, what: str) -> None:
    """Raise ExportError for a character that XML 1.0 cannot represent."""
    found = _NOT_IN_XML.search(text)
    if found is not None:
        raise ExportError(
            f"the {what} {text!r} holds {found[0]!r}, which XML cannot represent; choose another format"
        )
