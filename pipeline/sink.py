"""The last stage: one Parquet file per shard, whole or not at all. Its presence is the commit."""

import io
import time

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.poison import forget_attempts
from pipeline.storage import Storage, join

# A shard is one row group unless it is very large: readers that scan one column touch little else.
ROW_GROUP = 1024


def shard_file(shard: int) -> str:
    """The file of a shard, relative to the run folder; it depends on the shard's number alone."""
    return f"labels/shard-{shard:06d}.parquet"


def write_shard(table: pa.Table, storage: Storage, run_uri: str, schema: pa.Schema) -> pa.Table:
    """Write one labeled shard and return its one-row summary: shard, images, failed, bytes, finished (epoch s).

    Writing a shard again, after a retry, puts the same rows under the same name.
    Raises ValueError if the block is not exactly one shard.
    """
    shards = table.column("shard").unique().to_pylist()
    if len(shards) != 1:
        raise ValueError(f"a block must be one shard, got {len(shards)}: {shards[:5]}")
    labels = table.drop_columns(["shard"]).cast(schema)
    data = encode(labels)
    storage.write(join(run_uri, shard_file(shards[0])), data)
    forget_attempts(storage, run_uri, shards[0])
    failed = [kind for kind in labels.column("error_type").to_pylist() if kind is not None]
    return pa.table(
        {
            "shard": [shards[0]],
            "images": [len(labels)],
            "failures": pa.array([failed], pa.list_(pa.string())),
            "bytes": [len(data)],
            "finished": [time.time()],
        }
    )


def encode(labels: pa.Table) -> bytes:
    """Parquet bytes of a label table: zstd, no dictionaries where every value differs."""
    buffer = io.BytesIO()
    repeated = ["mask_codec", "status", "error_type", "stage", "run_fingerprint"]
    pq.write_table(labels, buffer, compression="zstd", row_group_size=ROW_GROUP, use_dictionary=repeated)
    return buffer.getvalue()
