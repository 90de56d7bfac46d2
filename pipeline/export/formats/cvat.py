"""CVAT for images 1.1: an XML file with one mask per connected region, and the labels of the task.

annotations.xml    upload to a task whose images have the same names; masks are in the upright grid CVAT shows
labels.json        paste as the task's raw labels
images/NAME.jpg    the images, if copied
"""

import json
from collections.abc import Iterable, Iterator
from xml.sax.saxutils import escape, quoteattr

import numpy as np

from cliper.pipeline.export.base import (
    Exporter,
    Item,
    Plan,
    Record,
    Records,
    hex_colour,
    refuse_unprintable,
    require_printable_names,
)
from cliper.pipeline.export.folder import Folder
from cliper.pipeline.export.regions import boxes, components
from cliper.pipeline.export.runlength import runs


def region_masks(labels: np.ndarray) -> Iterator[tuple[int, int, int, np.ndarray]]:
    """(label, left, top, mask bool [h, w] of its bounding box) of every connected region of every label but 0."""
    ids, owners = components(labels)
    for number, left, top, width, height, _ in boxes(ids):
        yield owners[number - 1], left, top, ids[top : top + height, left : left + width] == number


def region_rle(mask: np.ndarray) -> list[int]:
    """CVAT's code of a bool [h, w]: lengths of runs in row order, starting with zeros (possibly 0 of them)."""
    _, lengths, values = runs(mask.ravel())
    counts: list[int] = lengths.tolist()
    return [0, *counts] if values[0] else counts


def _masks(item: Item, plan: Plan) -> str:
    lines = []
    for label, left, top, mask in region_masks(item.labels):
        height, width = mask.shape
        rle = ", ".join(map(str, region_rle(mask)))
        lines.append(
            f'    <mask label={quoteattr(plan.class_names[label - 1])} source="auto" occluded="0" rle="{rle}" '
            f'left="{left}" top="{top}" width="{width}" height="{height}" z_order="0"></mask>\n'
        )
    return "".join(lines)


def _shard(items: Iterable[Item], folder: Folder, plan: Plan, shard: int) -> Iterator[Record]:
    for item in items:
        name = item.image_id
        if item.image is not None:
            name = f"{item.name}{item.image_ending}"
            folder.write(f"images/{name}", item.image)
        refuse_unprintable(name, "image id")
        height, width = item.size
        attributes = f'name={quoteattr(name)} width="{width}" height="{height}"'
        yield item.record(plan) | {"attributes": attributes, "masks": _masks(item, plan)}


def _finish(records: Records, folder: Folder, plan: Plan) -> None:
    folder.write("labels.json", json.dumps(_labels(plan), ensure_ascii=False, indent=1).encode())
    with folder.create("annotations.xml") as handle:
        handle.write(_head(plan).encode())
        for number, record in enumerate(records):
            text = f'  <image id="{number}" {record["attributes"]}>\n{record["masks"]}  </image>\n'
            handle.write(text.encode())
        handle.write(b"</annotations>\n")


def _labels(plan: Plan) -> list[dict[str, object]]:
    return [
        {"name": name, "color": hex_colour(label), "type": "mask", "attributes": []}
        for label, name in enumerate(plan.class_names, 1)
    ]


def _head(plan: Plan) -> str:
    labels = "".join(
        f"        <label><name>{escape(name)}</name><color>{hex_colour(label)}</color><type>mask</type>"
        "<attributes></attributes></label>\n"
        for label, name in enumerate(plan.class_names, 1)
    )
    return f"""<?xml version="1.0" encoding="utf-8"?>
<annotations>
  <version>1.1</version>
  <meta>
    <task>
      <name>{escape(plan.fingerprint)}</name>
      <labels>
{labels}      </labels>
    </task>
  </meta>
"""


CVAT = Exporter(_shard, _finish, as_seen=True, instances=True, needs=("scipy",), check=require_printable_names)
