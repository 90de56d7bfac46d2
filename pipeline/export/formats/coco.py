"""COCO: `coco` (instances or one annotation per class), `coco-panoptic`, `coco-results` (scored predictions).

annotations/instances_SPLIT.json    and images/SPLIT/NAME.jpg, if copied
annotations/panoptic_SPLIT.json     and annotations/panoptic_SPLIT/NAME.png, whose colors are segment ids
results.json                        for COCOeval; image k is the k-th of cliper-images.jsonl without a reason

Category id k is label k. A class is "stuff" (one annotation covers all its pixels in an image) unless
options.instances makes it a thing: an annotation per connected region.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from cliper.pipeline.export.base import Exporter, Item, Plan, Record, Records, colour, plain_png
from cliper.pipeline.export.folder import Folder, write_list, write_object
from cliper.pipeline.export.options import SPLITS, Segmentation
from cliper.pipeline.export.polygons import outlines, overlap
from cliper.pipeline.export.regions import boxes, components
from cliper.pipeline.export.runlength import label_counts

Annotation = dict[str, Any]


def segment_rles(ids: np.ndarray) -> dict[int, dict[str, Any]]:
    """Compressed RLE {"size": [H, W], "counts": bytes} of every number but 0, from one pass over [H, W]."""
    from pycocotools import mask as coco

    height, width = ids.shape
    return {
        number: coco.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
        for number, counts in label_counts(ids.ravel(order="F")).items()
    }


def annotations(
    labels: np.ndarray, things: set[int] | None = None, kind: Segmentation = "rle", simplify: float = 0.0
) -> list[Annotation]:
    """COCO's annotations of [H, W], without ids: per label but 0, per connected region for the labels in `things`.

    With "polygon", a segment whose polygons vanish by simplification is left out.
    """
    from pycocotools import mask as coco

    if kind == "polygon":
        return list(_polygons(labels, things or set(), simplify))
    ids, owners = components(labels, things) if things else (labels, range(1, int(labels.max(initial=0)) + 1))
    return [
        {
            "category_id": owners[number - 1],
            "segmentation": _written(rle, ids.shape, kind),
            # One at a time, because pycocotools 2.0.11 fails on lists of more than 255.
            "area": int(coco.area(rle)),
            "bbox": coco.toBbox(rle).tolist(),
            "iscrowd": 0,
        }
        for number, rle in segment_rles(ids).items()
    ]


def _written(rle: dict[str, Any], shape: tuple[int, ...], kind: Segmentation) -> dict[str, Any]:
    if kind == "rle":
        return {"size": rle["size"], "counts": rle["counts"].decode()}
    from pycocotools import mask as coco

    [counts] = label_counts(coco.decode(rle).ravel(order="F")).values()
    return {"size": list(shape), "counts": counts.tolist()}


def _polygons(labels: np.ndarray, things: set[int], simplify: float) -> Iterator[Annotation]:
    ids, owners = components(labels, things)
    found: dict[int, list[np.ndarray]] = {}
    for number, points in outlines(ids, simplify):
        found.setdefault(number, []).append(points)
    areas = np.bincount(ids.ravel())
    for number, lines in sorted(found.items()):
        points = np.concatenate(lines)
        low, high = points.min(axis=0), points.max(axis=0)
        yield {
            "category_id": owners[number - 1],
            "segmentation": [line.ravel().tolist() for line in lines],
            "area": int(areas[number]),
            "bbox": [float(value) for value in (*low, *(high - low))],
            "iscrowd": 0,
        }


def _overlap(found: list[Annotation], labels: np.ndarray) -> list[int]:
    """Pixels [in both, in either] of polygons and the label map, summed over annotations of one class each."""
    from pycocotools import mask as coco

    height, width = labels.shape
    by_class: dict[int, list[Any]] = {}
    for one in found:
        by_class.setdefault(one["category_id"], []).extend(one["segmentation"])

    def drawn(label: int) -> np.ndarray:
        if label not in by_class:
            return np.zeros(labels.shape, bool)
        decoded: np.ndarray = coco.decode(coco.merge(coco.frPyObjects(by_class[label], height, width)))
        return decoded.astype(bool)

    return overlap(labels, drawn)


def _coco_shard(items: Iterable[Item], folder: Folder, plan: Plan, shard: int) -> Iterator[Record]:
    chosen = plan.options
    for item in items:
        found = annotations(item.labels, plan.things, chosen.segmentation, chosen.simplify)
        scored = [one | {"score": item.scores.get(one["category_id"], 0.0)} for one in found]
        kept = {"overlap": _overlap(found, item.labels)} if chosen.simplify else {}
        yield _image(item, folder, plan) | {"annotations": scored} | kept


def _image(item: Item, folder: Folder, plan: Plan) -> dict[str, Any]:
    """COCO's `images` entry of a record; copies the image if requested, to images/SPLIT."""
    record, file_name = item.record(plan), item.uri
    if item.image is not None:
        file_name = f"{item.name}{item.image_ending}"
        folder.write(f"images/{record['split']}/{file_name}", item.image)
    height, width = item.size
    return record | {
        "image": {"file_name": file_name, "width": width, "height": height, "cliper_image_id": item.image_id}
    }


def _coco_finish(records: Records, folder: Folder, plan: Plan) -> None:
    def of_split(split: str) -> Iterator[Annotation]:
        number = 0
        for image_id, record in enumerate(records, 1):
            for annotation in record["annotations"]:
                number += 1
                if record["split"] == split:
                    yield {"id": number, "image_id": image_id} | annotation

    for split in splits_of(records):
        _write_dataset(records, folder, plan, f"annotations/instances_{split}.json", split, of_split(split))


def splits_of(records: Records) -> list[str]:
    """The splits that have an image; `train` if none has."""
    there = {record["split"] for record in records}
    return [split for split in SPLITS if split in there] or ["train"]


def _write_dataset(
    records: Records, folder: Folder, plan: Plan, name: str, split: str, annotations: Iterator[dict[str, Any]]
) -> None:
    numbered = enumerate(records, 1)
    images = ({"id": number} | record["image"] for number, record in numbered if record["split"] == split)
    info = {"description": f"cliper run {plan.run_name}, {plan.fingerprint}", "version": plan.fingerprint}
    with folder.create(name) as handle:
        members = {"info": info, "licenses": [], "categories": _categories(plan), "images": images}
        write_object(handle, iter((members | {"annotations": annotations}).items()))


def _categories(plan: Plan) -> list[dict[str, Any]]:
    return [
        {
            "id": label,
            "name": name,
            "supercategory": "thing" if label in plan.things else "stuff",
            "isthing": int(label in plan.things),
            "color": list(colour(label)),
        }
        for label, name in enumerate(plan.class_names, 1)
    ]


def _panoptic_shard(items: Iterable[Item], folder: Folder, plan: Plan, shard: int) -> Iterator[Record]:
    for item in items:
        record = _image(item, folder, plan)
        ids, owners = components(item.labels, plan.things)
        name = f"{item.name}.png"
        folder.write(f"annotations/panoptic_{record['split']}/{name}", _ids_png(ids))
        found = [one | {"score": item.scores.get(one["category_id"], 0.0)} for one in segments(ids, owners)]
        yield record | {"annotation": {"file_name": name, "segments_info": found}}


def segments(ids: np.ndarray, owners: list[int]) -> list[dict[str, Any]]:
    """COCO panoptic `segments_info` of segment numbers [H, W] and the label of each."""
    return [
        {"id": i, "category_id": owners[i - 1], "area": pixels, "bbox": [left, top, width, height], "iscrowd": 0}
        for i, left, top, width, height, pixels in boxes(ids)
    ]


def _ids_png(ids: np.ndarray) -> bytes:
    """RGB PNG whose pixels are the ids R + 256 G + 65536 B."""
    return plain_png(np.stack([ids & 255, ids >> 8 & 255, ids >> 16 & 255], axis=2).astype(np.uint8))


def _panoptic_finish(records: Records, folder: Folder, plan: Plan) -> None:
    for split in splits_of(records):
        numbered = enumerate(records, 1)
        found = ({"image_id": i} | record["annotation"] for i, record in numbered if record["split"] == split)
        _write_dataset(records, folder, plan, f"annotations/panoptic_{split}.json", split, found)


def _results_shard(items: Iterable[Item], folder: Folder, plan: Plan, shard: int) -> Iterator[Record]:
    wanted = ("category_id", "segmentation", "bbox")
    for item in items:
        found = annotations(item.labels, plan.things)
        scored = [
            {key: one[key] for key in wanted} | {"score": item.scores.get(one["category_id"], 0.0)}
            for one in found
        ]
        yield item.record(plan) | {"results": scored}


def _results_finish(records: Records, folder: Folder, plan: Plan) -> None:
    with folder.create("results.json") as handle:
        numbered = enumerate(records, 1)
        write_list(handle, ({"image_id": i} | one for i, record in numbered for one in record["results"]))


COCO = Exporter(
    _coco_shard,
    _coco_finish,
    val_share=0.0,
    instances=True,
    polygons=True,
    needs=("pycocotools", "scipy", "cv2"),
)
PANOPTIC = Exporter(_panoptic_shard, _panoptic_finish, val_share=0.0, instances=True, needs=("scipy",))
RESULTS = Exporter(_results_shard, _results_finish, instances=True, needs=("pycocotools", "scipy"))
