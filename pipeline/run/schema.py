"""The Arrow schema of a label shard. One row per image; a failed image is a row with its reason.

The schema may grow: a new column is nullable, is named in SINCE, and raises SCHEMA_VERSION. Readers choose columns
by name and fill those that an older file lacks with nulls.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from cliper.model.classes import ignore_value
from cliper.model.segmentation import Segmentation

SCHEMA_VERSION = 3
# Columns that came after version 1: the version that added each.
SINCE: dict[str, int] = {"proposed": 2, "pages": 3}
_VERSION = b"cliper.schema_version"  # file metadata


def _field(name: str, kind: pa.DataType, meaning: str, nullable: bool = True) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"meaning": meaning})


CLASS_ENTRY = pa.struct(
    [
        _field("class_id", pa.int32(), "label in the mask; 0 is background or unknown"),
        _field("name", pa.string(), "class name; 'background' for 0"),
        _field("pixels", pa.int64(), "pixels with this label"),
        _field("presence", pa.float32(), "image-level score of the class, about 0 to 1; null for background"),
        _field("mean_confidence", pa.float32(), "mean over the label's pixels, 0 to 1"),
        _field("p10_confidence", pa.float32(), "10th percentile over the label's pixels, 0 to 1"),
        _field("margin", pa.float32(), "mean lead over the second-best class, 0 to 1"),
    ]
)

# The storage type of Hugging Face's Image feature: PNG masks then load as images.
MASK = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])

COLUMNS = pa.schema(
    [
        _field("image_id", pa.string(), "stable id: path relative to the input, or the given id", nullable=False),
        _field("uri", pa.string(), "where the image was read from", nullable=False),
        _field("width", pa.int32(), "pixels, of the file's own grid; null if it could not be opened"),
        _field("height", pa.int32(), "pixels, of the file's own grid"),
        _field("orientation", pa.int8(), "EXIF orientation 1 to 8; the mask is in the file's grid, not turned"),
        _field("mask", MASK, "encoded label map [height, width] in `bytes`; `path` is null"),
        _field("mask_codec", pa.string(), "codec of `mask`, a key of MASK_CODECS"),
        _field("classes", pa.list_(CLASS_ENTRY), "the labels that occur, by class_id"),
        _field("confidence", pa.float32(), "mean over all pixels, 0 to 1"),
        _field("confidence_p10", pa.float32(), "10th percentile over all pixels, 0 to 1"),
        _field("margin", pa.float32(), "mean lead of the winner over the second-best, 0 to 1"),
        _field("status", pa.string(), "ok, failed, or poison (killed its process)", nullable=False),
        _field("error_type", pa.string(), "kind of failure, e.g. missing, corrupt, out_of_memory; null if ok"),
        _field("error_message", pa.string(), "what was wrong; null if ok"),
        _field("stage", pa.string(), "where it failed: load, decode, segment or encode; null if ok"),
        _field("attempts", pa.int32(), "how often the image was tried", nullable=False),
        _field("run_fingerprint", pa.string(), "identity of the run that wrote the row", nullable=False),
        _field("proposed", pa.list_(pa.int32()), "labels that the segmenter considered; null if all"),
        _field("pages", pa.int32(), "pages or frames of the file, of which one is labeled; null if not opened"),
    ]
)


def file_version(schema: pa.Schema) -> int | None:
    """The schema version that a label file was written with; None if it does not say."""
    stored = (schema.metadata or {}).get(_VERSION, b"").decode()
    return int(stored) if stored.isdecimal() else None


def require_label_file(schema: pa.Schema) -> None:
    """Raise ValueError for a file of a newer version, or without a column that its version has."""
    version = file_version(schema) or 1
    if version > SCHEMA_VERSION:
        raise ValueError(
            f"it has schema version {version}; this cliper reads up to {SCHEMA_VERSION}: install a newer one"
        )
    lacking = [name for name in COLUMNS.names if name not in schema.names and SINCE.get(name, 1) <= version]
    if lacking:
        raise ValueError(
            f"not a label file: it has no column {lacking[0]}; its columns are {', '.join(schema.names)}"
        )


def by_name(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The columns of `schema`, chosen from a table by name and cast; nulls where the table has none.

    The table's metadata is kept. Raises pyarrow's ArrowInvalid for values that do not fit.
    """
    columns = [
        table[field.name].cast(field.type)
        if field.name in table.column_names
        else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema.with_metadata(table.schema.metadata))


def label_columns(names: Sequence[str]) -> pa.Schema:
    """COLUMNS, reduced to `names` in their order. Raises KeyError for a name that is not one of them."""
    return pa.schema([COLUMNS.field(name) for name in names])


def label_schema(class_names: Sequence[str], fingerprint: str, mask_codec: str, model: str) -> pa.Schema:
    """COLUMNS with the file's metadata: class table, ignore value, schema version, fingerprint, HF features.

    `model` is the one-line description of the weights (it says so if they are untrained).
    """
    table = {"0": "background"} | {str(i): name for i, name in enumerate(class_names, 1)}
    metadata = {
        "cliper.schema_version": str(SCHEMA_VERSION),
        "cliper.classes": json.dumps(table, ensure_ascii=False),
        "cliper.ignore_value": str(ignore_value(len(class_names))),
        "cliper.run_fingerprint": fingerprint,
        "cliper.model": model,
        "huggingface": json.dumps({"info": {"features": hf_features(mask_codec)}}),
    }
    return COLUMNS.with_metadata(metadata)


def class_entries(found: Segmentation, names: Sequence[str]) -> list[dict[str, Any]]:
    """The `classes` column: one entry per label that occurs, in order."""
    return [
        {
            "class_id": label,
            "name": names[label - 1] if label else "background",
            "pixels": int(found.pixels[label]),
            "presence": float(found.presence[label - 1]) if label else None,
            "mean_confidence": float(found.class_confidence[label]),
            "p10_confidence": float(found.class_confidence_p10[label]),
            "margin": float(found.class_margin[label]),
        }
        for label in np.flatnonzero(found.pixels).tolist()
    ]


def hf_features(mask_codec: str) -> dict[str, Any]:
    """Hugging Face `datasets` features of COLUMNS, so that PNG masks load as images."""
    features = {field.name: _hf_feature(field.type) for field in COLUMNS}
    if mask_codec == "png":
        features["mask"] = {"_type": "Image"}
    return features


def _hf_feature(kind: pa.DataType) -> Any:
    if pa.types.is_list(kind):
        return {"_type": "List", "feature": _hf_feature(kind.value_type)}
    if pa.types.is_struct(kind):
        return {kind.field(i).name: _hf_feature(kind.field(i).type) for i in range(kind.num_fields)}
    names = {"float": "float32"}
    return {"_type": "Value", "dtype": names.get(str(kind), str(kind))}
