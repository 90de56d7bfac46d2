"""A Hugging Face dataset folder: one Parquet file per shard and a README.md with the features.

data/shard-000000.parquet       image_id, mask (an image), image (if images are copied), and the row's metadata
README.md                       the dataset card; `load_dataset(FOLDER)` needs no other file
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from cliper.pipeline.export.base import Exporter, Item, Plan, Record, Records
from cliper.pipeline.export.folder import Folder
from cliper.pipeline.run.schema import COLUMNS, MASK, hf_features

_ROW_GROUP = 100  # rows; the Hub's viewer reads a row group at a time
_LEFT_OUT = ("mask_codec", "run_fingerprint")  # the mask is PNG here, and the card names the run
_LISTED = 1000  # classes listed in the card; longer lists are in classes.json only


def features(plan: Plan) -> dict[str, Any]:
    """The column types as Hugging Face features."""
    found = {name: kind for name, kind in hf_features("png").items() if name not in _LEFT_OUT}
    return ({"image": {"_type": "Image"}} if plan.images else {}) | found


def _schema(plan: Plan) -> pa.Schema:
    fields = [COLUMNS.field(name) if name != "image" else pa.field("image", MASK) for name in features(plan)]
    return pa.schema(fields, {"huggingface": json.dumps({"info": {"features": features(plan)}})})


def _shard(items: Iterable[Item], folder: Folder, plan: Plan, shard: int) -> Iterator[Record]:
    items = iter(items)
    first = next(items, None)
    if first is None:
        return
    schema = _schema(plan)
    name = f"data/shard-{shard:06d}.parquet"
    with folder.create(name) as handle, pq.ParquetWriter(handle, schema, compression="zstd") as writer:
        rows = itertools.chain([first], items)
        while group := list(itertools.islice(rows, _ROW_GROUP)):
            writer.write_table(pa.Table.from_pylist([_row(item, schema.names) for item in group], schema))
            yield from ({"image_id": i.image_id, "name": i.name, "uri": i.uri, "file": name} for i in group)


def _row(item: Item, columns: Sequence[str]) -> dict[str, Any]:
    has_mask = item.row["mask_codec"] is not None
    images = {"mask": {"bytes": item.png, "path": f"{item.name}.png"} if has_mask else None}
    if item.image is not None:
        images["image"] = {"bytes": item.image, "path": f"{item.name}{item.image_ending}"}
    return {name: images[name] if name in images else item.row[name] for name in columns}


def _finish(records: Records, folder: Folder, plan: Plan) -> None:
    names = {"0": "background"} | {str(label): name for label, name in enumerate(plan.class_names, 1)}
    folder.write("classes.json", json.dumps(names, ensure_ascii=False, indent=0).encode())
    images = sum(1 for _ in records)
    folder.write("README.md", card(plan, images).encode())


def card(plan: Plan, images: int) -> str:
    """The dataset card: YAML for the Hub, and a description for readers."""
    header = {
        "task_categories": ["image-segmentation"],
        "tags": ["cliper", "pseudo-labels"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}],
        "dataset_info": {"features": _card_features(features(plan))},
    }
    yaml_text = yaml.safe_dump(header, allow_unicode=True, sort_keys=False)
    classes = ", ".join(f"{label} {name}" for label, name in enumerate(plan.class_names[:_LISTED], 1))
    rest = ", ..." if len(plan.class_names) > _LISTED else ""
    return f"""---
{yaml_text}---

# Masks by cliper

{images} images with semantic masks that a model made from class names; no person has drawn them.

- Run: `{plan.run_uri}`, fingerprint `{plan.fingerprint}`
- `mask`: a PNG of labels at the image's size. 0 is background or unknown; {plan.ignore_value} is never written and
  free for trainers to ignore. Pixels are in the file's own grid: EXIF orientation is not applied.
- `image`: {"the source, its orientation tag reset" if plan.images else "not copied; `uri` is its address"}
- Classes (also in `classes.json`): {classes}{rest}
"""


def _card_features(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Features in the form of a dataset card: a list of {name, dtype | list | struct}."""
    return [{"name": name, **_card_type(kind)} for name, kind in found.items()]


def _card_type(kind: Mapping[str, Any]) -> dict[str, Any]:
    if kind.get("_type") == "Value":
        return {"dtype": kind["dtype"]}
    if kind.get("_type") == "List":
        inner = kind["feature"]
        return {"list": inner["dtype"] if inner.get("_type") == "Value" else _card_features(inner)}
    if kind.get("_type") == "Image":
        return {"dtype": "image"}
    return {"struct": _card_features(kind)}


HUGGINGFACE = Exporter(_shard, _finish, image_formats=("PNG", "JPEG", "WEBP", "BMP", "TIFF"), keeps_failed=True)
