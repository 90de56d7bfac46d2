"""Ultralytics YOLO segmentation: polygons in text files. Class k - 1 is label k; unlabeled pixels have no line.

images/{train,val}/NAME.jpg     the images, if copied
labels/{train,val}/NAME.txt     one polygon per line: class x y x y ..., as shares of width and height
data.yaml
"""

from collections.abc import Iterable, Iterator

import numpy as np
import yaml

from cliper.pipeline.export.base import Exporter, Item, Plan, Record, Records
from cliper.pipeline.export.folder import Folder
from cliper.pipeline.export.polygons import polygons

_DECIMALS = 7  # exact to a hundredth of a pixel in images of up to 65,535 pixels


def polygon_lines(labels: np.ndarray) -> Iterator[str]:
    """A line per region of every label but 0 of [H, W]. Vertices are pixel centers, so (x + 0.5) / W."""
    height, width = labels.shape
    for label, points in polygons(labels):
        shares = (points + 0.5) / (width, height)
        yield f"{label - 1} " + " ".join(f"{value:.{_DECIMALS}g}" for value in shares.ravel().tolist())


def _shard(items: Iterable[Item], folder: Folder, plan: Plan, shard: int) -> Iterator[Record]:
    for item in items:
        split = plan.split(item.image_id)
        text = "\n".join(polygon_lines(item.labels))
        folder.write(f"labels/{split}/{item.name}.txt", text.encode())
        if item.image is not None:
            folder.write(f"images/{split}/{item.name}{item.image_ending}", item.image)
        yield {"image_id": item.image_id, "name": item.name, "uri": item.uri, "split": split}


def _finish(records: Records, folder: Folder, plan: Plan) -> None:
    content = {"train": "images/train", "val": "images/val", "names": dict(enumerate(plan.class_names))}
    folder.write("data.yaml", yaml.safe_dump(content, allow_unicode=True, sort_keys=False).encode())


YOLO = Exporter(_shard, _finish, splits=True, needs_images=True, needs=("cv2", "scipy"))
