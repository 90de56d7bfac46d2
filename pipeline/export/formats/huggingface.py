"""A Hugging Face dataset folder: a Parquet file per shard and split, and a README.md with the features.

data/train-000000.parquet       image_id, mask (an image), image (if images are copied), and the row's metadata
README.md                       the dataset card; `load_dataset(FOLDER)` needs no other file
id2label.json                   names of the labels, as transformers' configurations hold them
croissant.json                  Croissant metadata of the Parquet files
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from cliper.pipeline.export.base import Exporter, Item, Plan, Record, Records
from cliper.pipeline.export.folder import Folder
from cliper.pipeline.export.options import BACKGROUND, SPLITS
from cliper.pipeline.run.schema import CLASS_ENTRY, COLUMNS, MASK, hf_features

_ROW_GROUP = 100  # rows; the Hub's viewer reads a row group at a time
_LEFT_OUT = ("mask_codec", "run_fingerprint")  # the mask is PNG here, and the card names the run
_LISTED = 1000  # classes listed in the card; longer lists are in id2label.json only


def features(plan: Plan) -> dict[str, Any]:
    """The column types as Hugging Face features; class ids are a ClassLabel."""
    found = {name: kind for name, kind in hf_features("png").items() if name not in _LEFT_OUT}
    entry = found["classes"]["feature"]
    names = [BACKGROUND, *plan.class_names]
    found["classes"] = found["classes"] | {
        "feature": entry | {"class_id": {"_type": "ClassLabel", "names": names}}
    }
    return ({"image": {"_type": "Image"}} if plan.images else {}) | found


def _schema(plan: Plan) -> pa.Schema:
    fields = [COLUMNS.field(name) if name != "image" else pa.field("image", MASK) for name in features(plan)]
    fields = [pa.field("classes", pa.list_(_ENTRY)) if field.name == "classes" else field for field in fields]
    return pa.schema(fields, {"huggingface": json.dumps({"info": {"features": features(plan)}})})


_ENTRY = pa.struct([f.with_type(pa.int64()) if f.name == "class_id" else f for f in CLASS_ENTRY])


def _shard(items: Iterable[Item], folder: Folder, plan: Plan, shard: int) -> Iterator[Record]:
    schema = _schema(plan)
    waiting: dict[str, list[Item]] = {}
    with ExitStack() as stack:
        writers: dict[str, pq.ParquetWriter] = {}
        for item in items:
            record = item.record(plan)
            split = record["split"]
            name = f"data/{split}-{shard:06d}.parquet"
            if split not in writers:
                handle = stack.enter_context(folder.create(name))
                writers[split] = stack.enter_context(pq.ParquetWriter(handle, schema, compression="zstd"))
            waiting.setdefault(split, []).append(item)
            if len(waiting[split]) == _ROW_GROUP:
                writers[split].write_table(_table(waiting.pop(split), schema))
            yield record | {"file": name}
        for split, rest in waiting.items():
            writers[split].write_table(_table(rest, schema))


def _table(items: Sequence[Item], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pylist([_row(item, schema.names) for item in items], schema)


def _row(item: Item, columns: Sequence[str]) -> dict[str, Any]:
    images = {"mask": {"bytes": item.png, "path": f"{item.name}.png"} if item.has_mask else None, "image": None}
    if item.image is not None:
        images["image"] = {"bytes": item.image, "path": f"{item.name}{item.image_ending}"}
    row = item.metadata
    return {name: images[name] if name in images else row[name] for name in columns}


def _finish(records: Records, folder: Folder, plan: Plan) -> None:
    folder.write("id2label.json", json.dumps(plan.id2label, ensure_ascii=False, indent=0).encode())
    counts = Counter(record["split"] for record in records)
    splits = {split: counts[split] for split in SPLITS if counts[split]} or {"train": 0}
    folder.write("README.md", card(plan, splits).encode())
    folder.write("croissant.json", json.dumps(croissant(plan, splits), ensure_ascii=False, indent=1).encode())


def card(plan: Plan, splits: Mapping[str, int]) -> str:
    """The dataset card: YAML for the Hub, and a description for readers. `splits`: images of each."""
    files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits]
    header = {
        "task_categories": ["image-segmentation"],
        "tags": ["cliper", "pseudo-labels"],
        "configs": [{"config_name": "default", "data_files": files}],
        "dataset_info": {"features": _card_features(features(plan))},
    }
    yaml_text = yaml.safe_dump(header, allow_unicode=True, sort_keys=False)
    classes = ", ".join(f"{label} {name}" for label, name in enumerate(plan.class_names[:_LISTED], 1))
    rest = ", ..." if len(plan.class_names) > _LISTED else ""
    counted = ", ".join(f"{split} {count}" for split, count in splits.items())
    doubtful = plan.options.ignore_below
    ignore = (
        "never written" if doubtful is None else f"a class of a mean confidence below {doubtful:g} in its image"
    )
    return f"""---
{yaml_text}---

# Masks by cliper

{sum(splits.values())} images ({counted}) with semantic masks that a model made from class names; no person has
drawn them.

- Run: `{plan.run_name}`, fingerprint `{plan.fingerprint}`
- `mask`: a PNG of labels at the image's size. 0 is background or unknown; {plan.ignore_value} is for trainers to
  ignore: {ignore}. Pixels are in the file's own grid: EXIF orientation is not applied.
- `image`: {"the source, its orientation tag reset" if plan.images else "not copied; `uri` is its address"}
- `id2label.json` names the labels, in the form that transformers takes. Classes: {classes}{rest}
"""


def croissant(plan: Plan, splits: Mapping[str, int]) -> dict[str, Any]:
    """Croissant 1.0 metadata: the Parquet files and their main columns."""
    kinds = {"image_id": "sc:Text", "uri": "sc:Text", "width": "sc:Integer", "height": "sc:Integer"}
    kinds |= {"confidence": "sc:Float", "mask": "sc:ImageObject"} | (
        {"image": "sc:ImageObject"} if plan.images else {}
    )
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "name": plan.run_name,
        "description": f"Semantic masks of {sum(splits.values())} images, cliper run {plan.fingerprint}",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "version": "1.0.0",
        "distribution": [
            {
                "@type": "cr:FileSet",
                "@id": split,
                "name": split,
                "encodingFormat": "application/x-parquet",
                "includes": f"data/{split}-*.parquet",
            }
            for split in splits
        ],
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": f"{split}-images",
                "name": f"{split}-images",
                "field": [_croissant_field(split, name, kind) for name, kind in kinds.items()],
            }
            for split in splits
        ],
    }


_CONTEXT = {  # of the Croissant 1.0 specification
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
} | {name: f"cr:{name}" for name in (
    *("citeAs", "column", "equivalentProperty", "extract", "field", "fileObject", "fileProperty", "fileSet"),
    *("format", "includes", "isLiveDataset", "jsonPath", "key", "md5", "parentField", "path", "recordSet"),
    *("references", "regex", "repeated", "replace", "samplingRate", "separator", "source", "subField"),
    "transform",
)}  # fmt: skip


def _croissant_field(split: str, name: str, kind: str) -> dict[str, Any]:
    source: dict[str, Any] = {"fileSet": {"@id": split}, "extract": {"column": name}}
    if kind == "sc:ImageObject":  # a column of structs {bytes, path}
        source["transform"] = {"jsonPath": "bytes"}
    return {
        "@type": "cr:Field",
        "@id": f"{split}-images/{name}",
        "name": name,
        "dataType": kind,
        "source": source,
    }


def _card_features(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Features in the form of a dataset card: a list of {name, dtype | list | struct}."""
    return [{"name": name, **_card_type(kind)} for name, kind in found.items()]


def _card_type(kind: Mapping[str, Any]) -> dict[str, Any]:
    if kind.get("_type") == "Value":
        return {"dtype": kind["dtype"]}
    if kind.get("_type") == "ClassLabel":
        return {"dtype": {"class_label": {"names": {str(i): name for i, name in enumerate(kind["names"])}}}}
    if kind.get("_type") == "List":
        inner = kind["feature"]
        return {"list": inner["dtype"] if inner.get("_type") == "Value" else _card_features(inner)}
    if kind.get("_type") == "Image":
        return {"dtype": "image"}
    return {"struct": _card_features(kind)}


HUGGINGFACE = Exporter(
    _shard,
    _finish,
    image_formats=("PNG", "JPEG", "WEBP", "BMP", "TIFF"),
    val_share=0.0,
    keeps_failed=True,
    ignores=True,
)
