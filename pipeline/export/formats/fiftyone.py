"""FiftyOne: a dataset folder with samples and masks.

    fiftyone.Dataset.from_dir(FOLDER, dataset_type=fiftyone.types.LegacyFiftyOneDataset)

metadata.json, samples.json           the self-describing form that every version of FiftyOne reads
fields/segmentation/NAME.png          grayscale labels (a palette would be read as colors), 16-bit above 254
data/NAME.jpg                         the images, if copied; else samples name their URIs
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from cliper.pipeline.export.base import Exporter, Item, Plan, Record, Records, plain_png
from cliper.pipeline.export.folder import Folder, write_object

FIELD = "segmentation"
_NUMBERS = ("confidence", "confidence_p10", "margin")


def _shard(items: Iterable[Item], folder: Folder, plan: Plan, shard: int) -> Iterator[Record]:
    for item in items:
        mask = f"fields/{FIELD}/{item.name}.png"
        folder.write(mask, plain_png(item.labels))
        path = item.uri
        if item.image is not None:
            path = f"data/{item.name}{item.image_ending}"
            folder.write(path, item.image)
        sample = _sample(item, path, mask)
        yield item.record(plan) | {"sample": sample}


def _sample(item: Item, path: str, mask: str) -> dict[str, Any]:
    height, width = item.size
    return {
        "filepath": path,
        "tags": [],
        "metadata": {"_cls": "ImageMetadata", "width": width, "height": height},
        "image_id": item.image_id,
        FIELD: {"_cls": "Segmentation", "tags": [], "mask_path": mask},
        **{name: item.row[name] for name in _NUMBERS},
    }


def _finish(records: Records, folder: Folder, plan: Plan) -> None:
    metadata = {
        "name": f"cliper-{plan.fingerprint}",
        "media_type": "image",
        "info": {
            "description": f"masks of the cliper run {plan.run_name}",
            "mask_targets": {FIELD: plan.id2label},
            "classes": {FIELD: list(plan.class_names)},
        },
    }
    folder.write("metadata.json", json.dumps(metadata, ensure_ascii=False, indent=1).encode())
    with folder.create("samples.json") as handle:
        write_object(handle, iter({"samples": (record["sample"] for record in records)}.items()))


FIFTYONE = Exporter(_shard, _finish, as_seen=True, ignores=True)
