"""COCO: `coco` (annotations with one RLE per class and image) and `coco-panoptic` (PNG ids and JSON).

Every class is "stuff": one annotation covers all its pixels in an image. Category id k is label k.
"""

import io
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from cliper.pipeline.export.base import Exporter, Item, Plan, Record, Records, colour
from cliper.pipeline.export.folder import Folder, write_object
from cliper.pipeline.export.runlength import label_counts


def class_rles(labels: np.ndarray) -> dict[int, dict[str, Any]]:
    """Compressed RLE {"size": [H, W], "counts": bytes} of every label but 0, from one pass over [H, W]."""
    from pycocotools import mask as coco

    height, width = labels.shape
    return {
        label: coco.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
        for label, counts in label_counts(labels.ravel(order="F")).items()
    }


def annotations(labels: np.ndarray) -> list[dict[str, Any]]:
    """COCO's annotations of [H, W], without ids: one per label but 0, with compressed RLE."""
    from pycocotools import mask as coco

    return [
        {
            "category_id": label,
            "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
            # One at a time, because pycocotools 2.0.11 fails on lists of more than 255.
            "area": int(coco.area(rle)),
            "bbox": coco.toBbox(rle).tolist(),
            "iscrowd": 0,
        }
        for label, rle in class_rles(labels).items()
    ]


def _coco_shard(items: Iterable[Item], folder: Folder, plan: Plan, shard: int) -> Iterator[Record]:
    for item in items:
        yield _image(item, folder) | {"annotations": annotations(item.labels)}


def _image(item: Item, folder: Folder) -> dict[str, Any]:
    """COCO's `images` entry of a record; copies the image if requested."""
    file_name = item.uri
    if item.image is not None:
        file_name = f"images/{item.name}{item.image_ending}"
        folder.write(file_name, item.image)
    height, width = item.size
    return {
        "image_id": item.image_id,
        "name": item.name,
        "uri": item.uri,
        "image": {"file_name": file_name, "width": width, "height": height, "cliper_image_id": item.image_id},
    }


def _coco_finish(records: Records, folder: Folder, plan: Plan) -> None:
    def numbered() -> Iterator[dict[str, Any]]:
        number = 0
        for image_id, record in enumerate(records, 1):
            for annotation in record["annotations"]:
                number += 1
                yield {"id": number, "image_id": image_id} | annotation

    _write_dataset(records, folder, plan, "annotations.json", numbered())


def _write_dataset(
    records: Records, folder: Folder, plan: Plan, name: str, annotations: Iterator[dict[str, Any]]
) -> None:
    images = ({"id": number} | record["image"] for number, record in enumerate(records, 1))
    info = {"description": f"cliper run {plan.fingerprint}", "run": plan.run_uri}
    with folder.create(name) as handle:
        members = {"info": info, "categories": _categories(plan), "images": images, "annotations": annotations}
        write_object(handle, iter(members.items()))


def _categories(plan: Plan) -> list[dict[str, Any]]:
    return [
        {"id": label, "name": name, "supercategory": "stuff", "isthing": 0, "color": list(colour(label))}
        for label, name in enumerate(plan.class_names, 1)
    ]


def _panoptic_shard(items: Iterable[Item], folder: Folder, plan: Plan, shard: int) -> Iterator[Record]:
    for item in items:
        name = f"{item.name}.png"
        folder.write(f"panoptic/{name}", _ids_png(item.labels))
        yield _image(item, folder) | {"annotation": {"file_name": name, "segments_info": segments(item.labels)}}


def segments(labels: np.ndarray) -> list[dict[str, Any]]:
    """COCO panoptic `segments_info` of [H, W]: one segment per label but 0, whose id is the label."""
    from scipy.ndimage import find_objects

    return [
        {
            "id": label,
            "category_id": label,
            "area": int(np.count_nonzero(labels[place] == label)),
            "bbox": [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start],
            "iscrowd": 0,
        }
        for label, place in enumerate(find_objects(labels.astype(np.int32)), 1)
        if place is not None
        for rows, columns in [place]
    ]


def _ids_png(labels: np.ndarray) -> bytes:
    """RGB PNG whose pixels are the ids R + 256 G + 65536 B."""
    pixels = np.zeros((*labels.shape, 3), np.uint8)
    pixels[..., 0] = labels & 255
    pixels[..., 1] = labels.astype(np.uint16) >> 8
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return buffer.getvalue()


def _panoptic_finish(records: Records, folder: Folder, plan: Plan) -> None:
    annotations = ({"image_id": number} | record["annotation"] for number, record in enumerate(records, 1))
    _write_dataset(records, folder, plan, "panoptic.json", annotations)


COCO = Exporter(_coco_shard, _coco_finish, needs=("pycocotools", "scipy"))
PANOPTIC = Exporter(_panoptic_shard, _panoptic_finish, needs=("scipy",))
