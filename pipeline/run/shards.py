"""The last stage: one Parquet file per shard, whole or not at all. Its presence is the commit.

Every file can be checked by itself: its pages carry CRCs, and its metadata a digest of the rows and what failed.
"""

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

from cliper.pipeline.errors import StorageError
from cliper.pipeline.run.attempts import forget_attempts
from cliper.pipeline.storage.backend import Storage
from cliper.pipeline.storage.sealed import SealedWriter
from cliper.pipeline.storage.uris import is_local, join
from cliper.pipeline.telemetry import committed

# A shard is one row group unless it is very large: readers that scan one column touch little else.
ROW_GROUP = 1024

VISIBLE_WITHIN = 90.0  # seconds from a commit until every node sees the file

DIGEST = b"cliper.digest"  # file metadata: see rows_digest
SHARD = b"cliper.shard"  # file metadata: the shard's number
FAILURES = b"cliper.failures"  # file metadata: JSON, error_type to number of rows

_SHARD_NAME = re.compile(r"shard-(\d{6,})\.parquet")


def shard_name(shard: int) -> str:
    """The name of a shard's file, in every folder that has one per shard; it depends on the number alone."""
    return f"shard-{shard:06d}.parquet"


def shard_file(shard: int) -> str:
    """The label file of a shard, relative to the run folder."""
    return f"labels/{shard_name(shard)}"


def shard_number(name: str) -> int | None:
    """The shard of a file of that name, or None: `shard-0000003.parquet` belongs to no shard."""
    match = _SHARD_NAME.fullmatch(name)
    number = None if match is None else int(match[1])
    return number if number is not None and shard_name(number) == name else None


def shards_in(names: Iterable[str]) -> set[int]:
    """The shards that have a file among these names."""
    return {shard for shard in map(shard_number, names) if shard is not None}


def write_shard(table: pa.Table, storage: Storage, run_uri: str, schema: pa.Schema) -> pa.Table:
    """Write one labeled shard and return its one-row summary: shard, images, failures, bytes, finished (epoch s).

    `several` counts the files with more than one page or frame.
    Writing a shard again, after a retry, puts the same rows under the same name.
    Raises ValueError if the block is not exactly one shard.
    """
    shards = table.column("shard").unique().to_pylist()
    if len(shards) != 1:
        raise ValueError(f"a block must be one shard, got {len(shards)}: {shards[:5]}")
    labels = table.drop_columns(["shard"]).cast(schema)
    data = encode(labels, shards[0])
    storage.write(join(run_uri, shard_file(shards[0])), data)
    forget_attempts(storage, run_uri, shards[0])
    failed = [kind for kind in labels.column("error_type").to_pylist() if kind is not None]
    committed(run_uri, labels.column("status").to_pylist(), failed, len(data))
    return pa.table(
        {
            "shard": [shards[0]],
            "images": [len(labels)],
            "failures": pa.array([failed], pa.list_(pa.string())),
            "several": [several_pages(labels)],
            "bytes": [len(data)],
            "finished": [time.time()],
        }
    )


def require_visible(storage: Storage, run_uri: str, shard: int) -> None:
    """Raise StorageError if a committed file does not appear on this machine: its writer has another disk.

    File systems of a network may show a new file up to a minute later.
    """
    file = join(run_uri, shard_file(shard))
    if not is_local(run_uri):
        return
    last = time.monotonic() + VISIBLE_WITHIN
    while not storage.exists(file):
        if time.monotonic() >= last:
            raise StorageError(
                f"a worker wrote {file}, and it is not on this machine: the nodes do not share the folder. "
                "Choose an output on a shared disk, or s3://"
            )
        time.sleep(0.5)


def several_pages(labels: pa.Table) -> int:
    """The number of files with more than one page or frame."""
    return pc.sum(pc.greater(labels["pages"], 1)).as_py() or 0


def encode(labels: pa.Table, shard: int | None = None) -> bytes:
    """Parquet bytes of a label table, sealed; DIGEST, FAILURES and the number of its shard in its metadata.

    zstd; no dictionaries where every value differs.
    """
    failures = Counter(kind for kind in labels.column("error_type").to_pylist() if kind is not None)
    added = {DIGEST: rows_digest(labels).encode(), FAILURES: json.dumps(failures, sort_keys=True).encode()}
    labels = labels.replace_schema_metadata((labels.schema.metadata or {}) | added)
    repeated = ["mask_codec", "status", "error_type", "stage", "run_fingerprint"]
    writer = SealedWriter(labels.schema, compression="zstd", use_dictionary=repeated)
    writer.write(labels, ROW_GROUP)
    return writer.close({} if shard is None else {SHARD.decode(): str(shard)})


def rows_digest(labels: pa.Table) -> str:
    """SHA-256 in hex over one JSON line per row, in order; a mask goes in as the SHA-256 of its bytes.

    It depends on the values alone, not on how Parquet or Arrow lays them out.
    """
    digest = hashlib.sha256()
    masks = pc.struct_field(labels.column("mask"), "bytes").to_pylist()
    for row, mask in zip(labels.drop_columns(["mask"]).to_pylist(), masks, strict=True):
        row["mask"] = None if mask is None else hashlib.sha256(mask).hexdigest()
        digest.update(json.dumps(row, separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()
