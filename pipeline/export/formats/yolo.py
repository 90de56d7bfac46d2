"""Ultralytics YOLO: polygons (`yolo-seg`) or boxes (`yolo-detect`). Class k - 1 is label k.

images/{train,val,test}/NAME.jpg     the images, if copied
labels/{train,val,test}/NAME.txt     a line per region: class x y x y ..., or class x y width height of its box, as
                                     shares of width and height; unlabeled pixels have no line
data.yaml
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import numpy as np
import yaml

from cliper.pipeline.export.base import Exporter, Item, Plan, Record, Records
from cliper.pipeline.export.folder import Folder
from cliper.pipeline.export.options import SPLITS
from cliper.pipeline.export.polygons import overlap, polygons
from cliper.pipeline.export.regions import boxes, components

_DECIMALS = 7  # exact to a hundredth of a pixel in images of up to 65,535 pixels

Lines = tuple[list[str], dict[str, list[int]]]


def polygon_lines(labels: np.ndarray, plan: Plan) -> Lines:
    """A line per region, and with simplification its agreement with the mask."""
    found = list(polygons(labels, plan.options.simplify))
    kept = {"overlap": _overlap(found, labels)} if plan.options.simplify else {}
    return list(lines_of(found, labels.shape)), kept


def lines_of(found: Iterable[tuple[int, np.ndarray]], shape: tuple[int, ...]) -> Iterator[str]:
    """The lines of polygons of an image of (H, W). Vertices are pixel centers, so (x + 0.5) / W."""
    for label, points in found:
        yield f"{label - 1} " + _numbers(((points + 0.5) / shape[::-1]).ravel())


def box_lines(labels: np.ndarray, plan: Plan) -> Lines:
    """A line per connected region of every label but 0 of [H, W], or of things only, if they are named."""
    height, width = labels.shape
    wanted = plan.things or None
    ids, owners = components(labels, wanted)
    lines = [
        f"{owners[i - 1] - 1} "
        + _numbers(np.array([(left + w / 2) / width, (top + h / 2) / height, w / width, h / height]))
        for i, left, top, w, h, _ in boxes(ids)
        if wanted is None or owners[i - 1] in wanted
    ]
    return lines, {}


def _numbers(values: np.ndarray) -> str:
    return " ".join(f"{value:.{_DECIMALS}g}" for value in values.tolist())


def _overlap(found: list[tuple[int, np.ndarray]], labels: np.ndarray) -> list[int]:
    """Pixels [in both, in either] of the filled polygons and the label map."""
    import cv2

    def drawn(label: int) -> np.ndarray:
        canvas = np.zeros(labels.shape, np.uint8)
        for number, points in found:
            if number == label:
                cv2.fillPoly(canvas, [points.astype(np.int32)], 1)
        return canvas > 0

    return overlap(labels, drawn)


def _shard(
    lines: Callable[[np.ndarray, Plan], Lines], items: Iterable[Item], folder: Folder, plan: Plan, shard: int
) -> Iterator[Record]:
    for item in items:
        record = item.record(plan)
        text, more = lines(item.labels, plan)
        folder.write(f"labels/{record['split']}/{item.name}.txt", "\n".join(text).encode())
        if item.image is not None:
            folder.write(f"images/{record['split']}/{item.name}{item.image_ending}", item.image)
        yield record | more


def _finish(records: Records, folder: Folder, plan: Plan) -> None:
    there = {"train", "val"} | {record["split"] for record in records}  # ultralytics demands these two
    paths = {split: f"images/{split}" for split in SPLITS if split in there}
    content = paths | {"names": dict(enumerate(plan.class_names))}
    folder.write("data.yaml", yaml.safe_dump(content, allow_unicode=True, sort_keys=False).encode())


YOLO = Exporter(
    partial(_shard, polygon_lines),
    _finish,
    val_share=0.1,
    instances=True,
    polygons=True,
    needs_images=True,
    needs=("cv2", "scipy"),
)
YOLO_DETECT = Exporter(
    partial(_shard, box_lines), _finish, val_share=0.1, instances=True, needs_images=True, needs=("scipy",)
)
