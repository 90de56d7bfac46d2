"""SageMaker Ground Truth: an augmented manifest of semantic segmentation, and the masks.

SPLIT.manifest            a line of JSON per image: source-ref, cliper-ref, cliper-ref-metadata
masks/NAME.png            labels, 8 bits, in Ground Truth's palette form (internal-color-map names them)
images/NAME.jpg           the images, if copied

SageMaker reads s3:// addresses: export to a bucket, or from a run whose images are in one.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from cliper.pipeline.export.base import Exporter, Item, Plan, Record, Records, hex_colour, require_8_bits
from cliper.pipeline.export.folder import Folder, compact_json
from cliper.pipeline.export.formats.coco import splits_of
from cliper.pipeline.storage.uris import join

ATTRIBUTE = "cliper-ref"  # of the masks in the manifest; SageMaker wants the ending -ref


def _shard(items: Iterable[Item], folder: Folder, plan: Plan, shard: int) -> Iterator[Record]:
    for item in items:
        mask = f"masks/{item.name}.png"
        folder.write(mask, item.png)
        source = item.uri
        if item.image is not None:
            name = f"images/{item.name}{item.image_ending}"
            folder.write(name, item.image)
            source = join(folder.uri, name)
        line = {"source-ref": source, ATTRIBUTE: join(folder.uri, mask)}
        yield item.record(plan) | {"line": line, "confidence": item.row["confidence"]}


def _finish(records: Records, folder: Folder, plan: Plan) -> None:
    metadata = _metadata(plan)
    for split in splits_of(records):
        with folder.create(f"{split}.manifest") as handle:
            for record in records:
                if record["split"] == split:
                    own = metadata | {"confidence": record["confidence"]}
                    handle.write(compact_json(record["line"] | {f"{ATTRIBUTE}-metadata": own}) + b"\n")


def _metadata(plan: Plan) -> dict[str, Any]:
    names = ["BACKGROUND", *plan.class_names]
    colours = {
        str(label): {"class-name": name, "hex-color": hex_colour(label), "confidence": 0}
        for label, name in enumerate(names)
    }
    return {
        "internal-color-map": colours,
        "type": "groundtruth/semantic-segmentation",
        "human-annotated": "no",
        "creation-date": "1970-01-01T00:00:00",  # fixed: the same run gives the same manifest
        "job-name": f"cliper-{plan.fingerprint}",
    }


def _notes(plan: Plan) -> Sequence[str]:
    return ["SageMaker reads s3:// addresses; paths of this machine in a manifest serve other readers only"]


SAGEMAKER = Exporter(
    _shard,
    _finish,
    image_formats=("JPEG", "PNG"),
    val_share=0.0,
    ignores=True,
    check=require_8_bits,
    notes=_notes,
)
