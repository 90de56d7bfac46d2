"""The images of a report: photograph and mask as data URIs, both upright."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import numpy as np

from cliper.pipeline.config import InputConfig, JobConfig
from cliper.pipeline.corpus.decode import decode, upright
from cliper.pipeline.corpus.load import load_entries
from cliper.pipeline.corpus.manifest import Manifest
from cliper.pipeline.errors import ImageError
from cliper.pipeline.report.images import OVERLAY_SIDE, colour, mask_layer, picture
from cliper.pipeline.run.folder import Run
from cliper.pipeline.run.masks import unpack_mask
from cliper.pipeline.run.reader import open_shard
from cliper.pipeline.storage.uris import is_local

_COLUMNS = (
    "image_id",
    "width",
    "height",
    "orientation",
    "mask",
    "mask_codec",
    "classes",
    "confidence",
    "margin",
    "uri",
    "status",
    "error_type",
    "error_message",
)
_THREADS = 4

Place = tuple[int, int]  # shard, row in it


@dataclass(frozen=True)
class Shown:
    """One image of a page."""

    image_id: str
    photo: str | None  # data URI; None if the source can no longer be read
    mask: str | None  # data URI of the colors, background transparent; None for a failed image
    width: int  # upright
    height: int
    confidence: float  # 0 to 1; 0 for a failed image, as `margin`
    labels: list[dict[str, Any]]  # name, color, share (of the image) and confidence of every label in the mask
    note: str = ""  # the reason if there is no photograph, or no mask
    margin: float = 0.0
    link: str | None = None  # address of the source, if a browser can open it
    status: str = "ok"

    def confidence_of(self, label: int) -> float:
        """Mean confidence of one label in this image, 0 to 1."""
        return next(float(entry["confidence"]) for entry in self.labels if entry["label"] == label)


def read_pictures(
    run: Run, manifest: Manifest, wanted: Iterable[Place], side: int = OVERLAY_SIDE
) -> dict[Place, Shown]:
    """Read the rows and the source images of `wanted`; each shard is read once.

    `side`: pixels of a picture's longer side. If a source image is missing or damaged, its mask is shown alone,
    with a note; a failed image has no mask, and the reason as its note.
    """
    by_shard: dict[int, set[int]] = defaultdict(set)
    for shard, place in wanted:
        by_shard[shard].add(place)
    with ThreadPoolExecutor(_THREADS) as pool:
        done = pool.map(lambda shard: _read_shard(run, manifest, shard, by_shard[shard], side), sorted(by_shard))
        return {place: shown for shard in done for place, shown in shard.items()}


def _read_shard(run: Run, manifest: Manifest, shard: int, wanted: set[int], side: int) -> dict[Place, Shown]:
    places = sorted(wanted)
    with open_shard(run, shard) as file:
        rows = file.read(list(_COLUMNS)).take(places).to_pylist()
    loaded = _load(run, manifest, shard, places)
    limit = run.identity.get("max_pixels", JobConfig().max_pixels)
    return {
        (shard, place): _shown(row, source, limit, side)
        for place, row, source in zip(places, rows, loaded, strict=True)
    }


def _load(run: Run, manifest: Manifest, shard: int, places: Sequence[int]) -> list[dict[str, Any]]:
    """The source images of some rows of a shard, as of `load_entries`."""
    entries = manifest.read_shard(run.storage, run.uri, shard)
    column = run.identity.get("input", {}).get("image_column", InputConfig().image_column)
    return load_entries(run.storage, shard, [entries[place] for place in places], column).to_pylist()


def read_source(run: Run, manifest: Manifest, place: Place) -> bytes:
    """The bytes of one row's image file. Raises ImageError if it cannot be read."""
    [source] = _load(run, manifest, place[0], [place[1]])
    if source["data"] is None:
        raise ImageError(source["error_type"], source["error_message"])
    return bytes(source["data"])


def _shown(row: Mapping[str, Any], source: Mapping[str, Any], max_pixels: int, side: int) -> Shown:
    mask = None
    if row["status"] == "ok":
        mask = np.ascontiguousarray(upright(unpack_mask(row), row["orientation"] or 1))
    photo: str | None = None
    size, note = (1, 1), f"{row['error_type']}: {row['error_message']}"
    if mask is not None:
        photo, size, note = _photo(source, max_pixels, side, (mask.shape[0], mask.shape[1]))
    elif row["status"] != "poison":  # its image ended a process: it is not opened again
        photo, size, _ = _photo(source, max_pixels, side, None)
    return Shown(
        image_id=row["image_id"],
        photo=photo,
        mask=None if mask is None else mask_layer(mask, side),
        width=size[1],
        height=size[0],
        confidence=row["confidence"] or 0.0,
        labels=[] if mask is None else [_label(entry, mask.size) for entry in row["classes"]],
        note=note,
        margin=row["margin"] or 0.0,
        link=_link(row["uri"]),
        status=row["status"],
    )


def _photo(
    source: Mapping[str, Any], max_pixels: int, side: int, shape: tuple[int, int] | None
) -> tuple[str | None, tuple[int, int], str]:
    """The photograph as a data URI, its height and width, and the reason if it is not there.

    `shape`: height and width of the mask that goes with it.
    """
    try:
        if source["data"] is None:
            raise ImageError(source["error_type"], source["error_message"])
        pixels = decode(source["data"], max_pixels, "accept").pixels
    except ImageError as error:
        return None, shape or (1, 1), f"{error.kind}: {error}"
    size = (pixels.shape[0], pixels.shape[1])
    if shape is not None and shape != size:
        now, then = (f"{width} x {height}" for height, width in (size, shape))
        return None, shape, f"the file is {now} now, the mask {then}"
    return picture(pixels, side), size, ""


def _link(uri: str) -> str | None:
    if uri.startswith(("http://", "https://")):
        return uri
    return f"file://{quote(uri.removeprefix('file://'))}" if is_local(uri) else None


def _label(entry: Mapping[str, Any], pixels: int) -> dict[str, Any]:
    return {
        "label": entry["class_id"],
        "name": entry["name"],
        "colour": colour(entry["class_id"]),
        "share": entry["pixels"] / pixels,
        "confidence": entry["mean_confidence"],
    }
