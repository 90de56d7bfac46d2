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
from cliper.pipeline.report.images import colour, mask_layer, picture
from cliper.pipeline.report.run_stats import Sampled
from cliper.pipeline.run.folder import Run
from cliper.pipeline.run.masks import unpack_mask
from cliper.pipeline.run.reader import open_shard
from cliper.pipeline.storage.backend import is_local

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
)
_THREADS = 4

Place = tuple[int, int]  # shard, row in it


@dataclass(frozen=True)
class Shown:
    """One image of a page."""

    image_id: str
    photo: str | None  # data URI; None if the source can no longer be read
    mask: str  # data URI of the colors, background transparent
    width: int  # upright
    height: int
    confidence: float
    labels: list[dict[str, Any]]  # name, color, share (of the image) and confidence of every label in the mask
    note: str = ""  # the reason if there is no photograph
    margin: float = 0.0
    link: str | None = None  # address of the source, if a browser can open it

    def confidence_of(self, label: int) -> float:
        """Mean confidence of one label in this image, 0 to 1."""
        return next(float(entry["confidence"]) for entry in self.labels if entry["label"] == label)


def read_pictures(run: Run, manifest: Manifest, picks: Iterable[Sampled]) -> dict[Place, Shown]:
    """Read the rows and the source images of `picks`; each shard with a pick is read once.

    If a source image is missing or damaged, its mask is shown alone, with a note.
    """
    wanted: dict[int, set[int]] = defaultdict(set)
    for pick in picks:
        wanted[pick.shard].add(pick.place)
    with ThreadPoolExecutor(_THREADS) as pool:
        done = pool.map(lambda item: _read_shard(run, manifest, item[0], sorted(item[1])), sorted(wanted.items()))
        return {place: shown for shard in done for place, shown in shard.items()}


def _read_shard(run: Run, manifest: Manifest, shard: int, places: Sequence[int]) -> dict[Place, Shown]:
    with open_shard(run, shard) as file:
        rows = file.read(list(_COLUMNS)).take(places).to_pylist()
    entries = manifest.read_shard(run.storage, run.uri, shard)
    column = run.identity.get("input", {}).get("image_column", InputConfig().image_column)
    loaded = load_entries(run.storage, shard, [entries[place] for place in places], column).to_pylist()
    limit = run.identity.get("max_pixels", JobConfig().max_pixels)
    return {
        (shard, place): _shown(row, source, limit) for place, row, source in zip(places, rows, loaded, strict=True)
    }


def _shown(row: Mapping[str, Any], source: Mapping[str, Any], max_pixels: int) -> Shown:
    mask = upright(unpack_mask(row), row["orientation"] or 1)
    photo, note = None, ""
    try:
        if source["data"] is None:
            raise ImageError(source["error_type"], source["error_message"])
        pixels = decode(source["data"], max_pixels, "accept").pixels
        if pixels.shape[:2] == mask.shape:
            photo = picture(pixels)
        else:
            now, then = (f"{width} x {height}" for height, width in (pixels.shape[:2], mask.shape))
            note = f"the file is {now} now, the mask {then}"
    except ImageError as error:
        note = f"{error.kind}: {error}"
    return Shown(
        image_id=row["image_id"],
        photo=photo,
        mask=mask_layer(np.ascontiguousarray(mask)),
        width=mask.shape[1],
        height=mask.shape[0],
        confidence=row["confidence"],
        labels=[_label(entry, mask.size) for entry in row["classes"]],
        note=note,
        margin=row["margin"],
        link=_link(row["uri"]),
    )


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
