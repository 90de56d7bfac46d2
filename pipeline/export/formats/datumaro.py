"""Datumaro's own format: JSON per split with run-length masks, and the images.

annotations/SPLIT.json      items with masks, one per class or per connected region of things
images/SPLIT/NAME.jpg       the images, if copied
"""

from collections.abc import Iterable, Iterator
from typing import Any

from cliper.pipeline.export.base import Exporter, Item, Plan, Record, Records, colour
from cliper.pipeline.export.folder import Folder, write_object
from cliper.pipeline.export.formats.coco import annotations, splits_of
from cliper.pipeline.export.options import BACKGROUND


def _shard(items: Iterable[Item], folder: Folder, plan: Plan, shard: int) -> Iterator[Record]:
    for item in items:
        record, path = item.record(plan), ""
        if item.image is not None:
            path = f"{item.name}{item.image_ending}"
            folder.write(f"images/{record['split']}/{path}", item.image)
        height, width = item.size
        image = {"path": path, "size": [height, width]}
        attributes = {"image_id": item.image_id, "uri": item.uri}
        yield record | {
            "item": {
                "id": item.name,
                "annotations": list(_masks(item, plan)),
                "attr": attributes,
                "image": image,
            }
        }


def _masks(item: Item, plan: Plan) -> Iterator[dict[str, Any]]:
    for number, one in enumerate(annotations(item.labels, plan.things)):
        yield {
            "id": number,
            "type": "mask",
            "attributes": {"score": item.scores.get(one["category_id"], 0.0)},
            "group": 0,
            "label_id": one["category_id"],
            "rle": one["segmentation"],
            "z_order": 0,
        }


def _finish(records: Records, folder: Folder, plan: Plan) -> None:
    names = [BACKGROUND, *plan.class_names]
    colours = [colour(label) for label in range(len(names))]
    categories = {
        "label": {
            "labels": [{"name": name, "parent": "", "attributes": []} for name in names],
            "label_groups": [],
            "attributes": [],
        },
        "mask": {
            "colormap": [{"label_id": i, "r": r, "g": g, "b": b} for i, (r, g, b) in enumerate(colours)],
            "attributes": [],
        },
    }
    for split in splits_of(records):
        items = (record["item"] for record in records if record["split"] == split)
        info = {"description": f"cliper run {plan.run_name}, {plan.fingerprint}"}
        with folder.create(f"annotations/{split}.json") as handle:
            members = {"dm_format_version": "1.0", "media_type": 2, "infos": info, "categories": categories}
            write_object(handle, iter((members | {"items": items}).items()))


DATUMARO = Exporter(_shard, _finish, val_share=0.0, instances=True, needs=("pycocotools", "scipy"))
