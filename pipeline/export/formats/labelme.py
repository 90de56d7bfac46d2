"""LabelMe: a JSON file of polygons next to each image.

NAME.json    shapes in the image's upright grid, as LabelMe shows it; along the edges of pixels
NAME.jpg     the image, if copied; else imagePath is its address, which LabelMe opens only if it is a local path
labels.txt   for `labelme --labels labels.txt`
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from cliper.pipeline.export.base import Exporter, Item, Plan, Record, Records
from cliper.pipeline.export.folder import Folder
from cliper.pipeline.export.polygons import outlines

_VERSION = "5.5.0"  # of the file's layout


def _shard(items: Iterable[Item], folder: Folder, plan: Plan, shard: int) -> Iterator[Record]:
    for item in items:
        path = item.uri
        if item.image is not None:
            path = f"{item.name}{item.image_ending}"
            folder.write(path, item.image)
        height, width = item.size
        content: dict[str, Any] = {
            "version": _VERSION,
            "flags": {},
            "shapes": [
                {
                    "label": plan.class_names[label - 1],
                    "points": points.astype(float).tolist(),
                    "group_id": None,
                    "description": f"confidence {item.scores.get(label, 0.0):g}",
                    "shape_type": "polygon",
                    "flags": {},
                }
                for label, points in outlines(item.labels, plan.options.simplify)
            ],
            "imagePath": path,
            "imageData": None,
            "imageHeight": height,
            "imageWidth": width,
        }
        folder.write(f"{item.name}.json", json.dumps(content, ensure_ascii=False).encode())
        yield item.record(plan)


def _finish(records: Records, folder: Folder, plan: Plan) -> None:
    names = ["__ignore__", "_background_", *plan.class_names]
    folder.write("labels.txt", "".join(f"{name}\n" for name in names).encode())


LABELME = Exporter(
    _shard,
    _finish,
    image_formats=("PNG", "JPEG", "BMP"),
    as_seen=True,
    instances=True,
    polygons=True,
    needs=("cv2", "scipy"),
)
