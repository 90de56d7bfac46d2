"""Edit label maps before they are exported, and number their regions."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cliper.model.classes import ignore_value, mask_dtype
from cliper.pipeline.export.options import BACKGROUND, Options

NEIGHBOURS = np.ones((3, 3), int)  # 8-connected


@dataclass(frozen=True)
class Edit:
    """The changes that options make to the rows and label maps of a run."""

    options: Options
    classes: tuple[str, ...]  # of the run

    @property
    def changes(self) -> bool:
        """Whether any label can change; if not, stored PNGs are copied as they are."""
        chosen = self.options
        plain = self.options.label_of(self.classes) == tuple(range(len(self.classes) + 1))
        return not plain or bool(chosen.min_region or chosen.fill_holes or chosen.ignore_below is not None)

    def labels(self, labels: np.ndarray, row: Mapping[str, Any]) -> np.ndarray:
        """The exported label map of [H, W]."""
        table = np.array(self.options.label_of(self.classes))
        names = self.options.names(self.classes)
        if self.options.ignore_below is not None:
            doubtful = [
                one["class_id"]
                for one in row["classes"]
                if one["class_id"] and (one["mean_confidence"] or 0) < self.options.ignore_below
            ]
            table[doubtful] = ignore_value(len(names))
        found = table[labels].astype(mask_dtype(len(names)))
        if self.options.fill_holes:
            found = fill_holes(found, self.options.fill_holes)
        return remove_small(found, self.options.min_region) if self.options.min_region else found

    def row(self, row: Mapping[str, Any], labels: np.ndarray) -> dict[str, Any]:
        """The row with the `classes` of the exported labels; percentiles and margins are the run's no more."""
        names, table = self.options.names(self.classes), self.options.label_of(self.classes)
        counts = np.bincount(labels.ravel())
        present = [label for label in np.flatnonzero(counts).tolist() if label <= len(names)]
        sources = {label: [one for one in row["classes"] if table[one["class_id"]] == label] for label in present}
        entries = [_entry(label, names, int(counts[label]), sources[label]) for label in present]
        return {**row, "classes": entries}


def _entry(label: int, names: Sequence[str], pixels: int, sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    weight = sum(one["pixels"] for one in sources)
    mean = sum(one["mean_confidence"] * one["pixels"] for one in sources) / weight if weight else None
    presences = [one["presence"] for one in sources if one["presence"] is not None]
    return {
        "class_id": label,
        "name": names[label - 1] if label else BACKGROUND,
        "pixels": pixels,
        "presence": max(presences) if presences and label else None,
        "mean_confidence": mean,
        "p10_confidence": None,
        "margin": None,
    }


def components(labels: np.ndarray, wanted: set[int] | None = None) -> tuple[np.ndarray, list[int]]:
    """Number the segments of [H, W] from 1: int32 [H, W], and the label of each.

    A label in `wanted` (None: every one) has a segment per 8-connected region, another label one. 0 stays 0.
    """
    from scipy.ndimage import find_objects, label

    ids = np.zeros(labels.shape, np.int32)
    owners: list[int] = []
    for number, place in enumerate(find_objects(labels.astype(np.int32)), 1):
        if place is None:
            continue
        inside = labels[place] == number
        regions, count = label(inside, NEIGHBOURS) if wanted is None or number in wanted else (inside, 1)
        ids[place] += np.where(inside, regions + len(owners), 0).astype(np.int32)
        owners += [number] * count
    return ids, owners


def remove_small(labels: np.ndarray, pixels: int) -> np.ndarray:
    """Set regions of fewer than `pixels` pixels to 0."""
    ids, _ = components(labels)
    small = np.bincount(ids.ravel()) < pixels
    small[0] = False
    return np.where(small[ids], 0, labels).astype(labels.dtype)


def fill_holes(labels: np.ndarray, pixels: int) -> np.ndarray:
    """Give background holes of fewer than `pixels` pixels, surrounded by one class, that class."""
    from scipy.ndimage import find_objects, label

    holes, count = label(labels == 0)  # 4-connected, as regions are 8-connected
    sizes = np.bincount(holes.ravel(), minlength=count + 1)
    found = labels.copy()
    for number, place in enumerate(find_objects(holes), 1):
        around = _around(place, labels.shape)
        if sizes[number] < pixels and around is not None:
            _fill(found, labels, holes, number, around)
    return found


def _around(place: tuple[slice, slice], shape: tuple[int, ...]) -> tuple[slice, slice] | None:
    """The box with a margin of one pixel; None at the edge of the image, where nothing surrounds it."""
    if any(part.start == 0 or part.stop == size for part, size in zip(place, shape, strict=True)):
        return None
    rows, columns = (slice(part.start - 1, part.stop + 1) for part in place)
    return rows, columns


def _fill(found: np.ndarray, labels: np.ndarray, holes: np.ndarray, number: int, box: tuple[slice, slice]) -> None:
    from scipy.ndimage import binary_dilation

    inside = holes[box] == number
    neighbours = np.unique(labels[box][binary_dilation(inside) & ~inside])
    if len(neighbours) == 1:
        found[box][inside] = neighbours[0]


def boxes(ids: np.ndarray) -> Iterator[tuple[int, int, int, int, int, int]]:
    """(segment, left, top, width, height, pixels) of every segment of int [H, W]."""
    from scipy.ndimage import find_objects

    counts = np.bincount(ids.ravel())
    for number, place in enumerate(find_objects(ids), 1):
        if place is not None:
            rows, columns = place
            width, height = columns.stop - columns.start, rows.stop - rows.start
            yield number, columns.start, rows.start, width, height, int(counts[number])
