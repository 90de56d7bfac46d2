"""Label shards can be read by other tools."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cliper.pipeline.run.masks import pack_mask
from cliper.pipeline.run.schema import COLUMNS, label_schema
from cliper.pipeline.run.shards import encode, shard_file, write_shard
from cliper.pipeline.storage.backend import Storage


def label_table(schema: pa.Schema) -> pa.Table:
    labels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    entry = {"class_id": 1, "name": "cat", "pixels": 1, "presence": 0.5}
    good = {"image_id": "a", "uri": "/a", "width": 4, "height": 3, "orientation": 1, "status": "ok", "attempts": 1}
    good |= {"classes": [entry]} | pack_mask(labels, "png")
    bad = {"image_id": "b", "uri": "/b", "status": "failed", "error_type": "empty", "attempts": 1}
    rows = [row | {"run_fingerprint": "f" * 16} for row in (good, bad)]
    return pa.Table.from_pylist(rows, schema)


def test_hugging_face_datasets_show_masks_as_images(tmp_path: Path) -> None:
    from datasets import Image, load_dataset

    schema = label_schema(["cat"], "f" * 16, "png", "a model")
    (tmp_path / "shard.parquet").write_bytes(encode(label_table(schema)))
    found = load_dataset("parquet", data_files=str(tmp_path / "shard.parquet"), cache_dir=str(tmp_path / "cache"))[
        "train"
    ]
    assert isinstance(found.features["mask"], Image)
    assert np.array_equal(np.array(found[0]["mask"]), np.arange(12).reshape(3, 4))
    assert found[1]["mask"] is None
    assert found[0]["classes"][0]["name"] == "cat"


def test_metadata_and_column_meanings_survive_the_file() -> None:
    schema = label_schema(["猫", "dog"], "0123456789abcdef", "coco-rle", "a model")
    read = pq.read_schema(io.BytesIO(encode(label_table(schema))))
    assert read.metadata[b"cliper.classes"].decode() == '{"0": "background", "1": "猫", "2": "dog"}'
    assert read.metadata[b"cliper.ignore_value"] == b"255"
    assert read.metadata[b"cliper.run_fingerprint"] == b"0123456789abcdef"
    assert all(read.field(name).metadata[b"meaning"] for name in COLUMNS.names)


def test_many_classes_reserve_the_16_bit_ignore_value() -> None:
    schema = label_schema([f"c{i}" for i in range(255)], "f", "png", "m")
    assert schema.metadata[b"cliper.ignore_value"] == b"65535"


def test_a_block_is_one_shard(tmp_path: Path) -> None:
    schema = label_schema(["cat"], "f" * 16, "png", "a model")
    table = label_table(COLUMNS).add_column(0, "shard", pa.array([3, 3], pa.int32()))
    summary = write_shard(table, Storage(), str(tmp_path), schema).to_pylist()[0]
    assert (summary["shard"], summary["images"], summary["failures"]) == (3, 2, ["empty"])
    assert pq.read_table(tmp_path / shard_file(3)).num_rows == 2
    mixed = table.set_column(0, "shard", pa.array([3, 4], pa.int32()))
    with pytest.raises(ValueError, match="a block must be one shard, got 2"):
        write_shard(mixed, Storage(), str(tmp_path), schema)
