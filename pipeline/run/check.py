"""Check one shard's file against the manifest and against itself. Runs in a separate process; see verify.py."""

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cliper.pipeline.errors import StorageError
from cliper.pipeline.run.masks import unpack_mask
from cliper.pipeline.run.schema import file_version, label_schema, require_label_file
from cliper.pipeline.run.shards import DIGEST, SHARD, rows_digest, shard_file
from cliper.pipeline.storage.backend import Storage
from cliper.pipeline.storage.sealed import check_seal
from cliper.pipeline.storage.uris import join

NAMED = 3  # ids given as examples
IDENTITY = (b"cliper.schema_version", b"cliper.classes", b"cliper.ignore_value", b"cliper.run_fingerprint")


@dataclass(frozen=True)
class Problem:
    """Something wrong with one file; `kind` is a key of verify.KINDS, which says what `count` counts."""

    kind: str
    file: str  # relative to the run folder
    detail: str
    count: int = 1


@dataclass(frozen=True)
class ShardJob:
    """A finished shard, the ids and URIs the manifest gives it in order, and the run it must belong to."""

    storage: Storage
    run_uri: str
    shard: int
    ids: Sequence[str]
    fingerprint: str
    class_names: Sequence[str]
    uris: Sequence[str] = ()  # none: not compared


@dataclass
class ShardCheck:
    """The findings in one shard's file."""

    file: str
    rows: int = 0
    failed: int = 0
    problems: list[Problem] = field(default_factory=list)

    def add(self, kind: str, detail: str, count: int = 1) -> None:
        """Write a problem down."""
        self.problems.append(Problem(kind, self.file, detail, count))


def check_shard(job: ShardJob) -> ShardCheck:
    """Read a shard's file whole and check all of it; see verify.py for what."""
    check = ShardCheck(shard_file(job.shard))
    try:
        data = job.storage.read(join(job.run_uri, check.file))
        table = read_labels(data)
    except (StorageError, pa.ArrowException, OSError, ValueError) as error:
        check.add("unreadable", f"{type(error).__name__}: {error}")
        check.add("missing", "all of its images", len(job.ids))
        return check
    check.rows = len(table)
    _check_ids(check, table.column("image_id").to_pylist(), job.ids)
    _check_uris(check, table, job)
    _check_identity(check, table, job)
    stored = (table.schema.metadata or {}).get(DIGEST)
    if stored != rows_digest(table).encode():
        check.add("wrong_checksum", "it has no digest" if stored is None else "its rows do not match its digest")
    _check_rows(check, table, ["background", *job.class_names])
    return check


def read_labels(data: bytes) -> pa.Table:
    """Read a label file of any schema version so far, with the columns it has; its seal and page CRCs are checked.

    Raises OSError or pyarrow's errors for damage, ValueError for another kind of file or a newer version.
    """
    check_seal(data)
    table = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True).read()
    require_label_file(table.schema)
    return table


def _check_ids(check: ShardCheck, found: Sequence[str], expected: Sequence[str]) -> None:
    if list(found) == list(expected):
        return
    have, want = Counter(found), Counter(expected)
    extra = list((have - want).elements())
    missing = list((want - have).elements())
    doubled, foreign = [i for i in extra if i in want], [i for i in extra if i not in want]
    for kind, ids in (("missing", missing), ("doubled", doubled), ("foreign", foreign)):
        if ids:
            check.add(kind, _named(ids), len(ids))
    if have == want:
        check.add("misplaced", "the ids are the manifest's, their order is not")


def _check_uris(check: ShardCheck, table: pa.Table, job: ShardJob) -> None:
    expected = dict(zip(job.ids, job.uris, strict=False))
    found = zip(table.column("image_id").to_pylist(), table.column("uri").to_pylist(), strict=True)
    other = [image_id for image_id, uri in found if expected.get(image_id, uri) != uri]
    if other:
        check.add("other_uri", _named(other), len(other))


def _check_identity(check: ShardCheck, table: pa.Table, job: ShardJob) -> None:
    stored, prints = table.schema.metadata or {}, set(table["run_fingerprint"].to_pylist())
    expected = label_schema(job.class_names, job.fingerprint, "", "").metadata
    if file_version(table.schema) is not None:  # any version that read_labels accepts
        expected |= {IDENTITY[0]: stored[IDENTITY[0]]}
    wrong = [key for key in IDENTITY if stored.get(key) != expected[key]]
    if stored.get(SHARD) not in (None, str(job.shard).encode()):
        wrong.append(SHARD)
    if wrong:
        check.add("wrong_identity", f"{wrong[0].decode()} is {stored.get(wrong[0])!r:.80}")
    elif prints != {job.fingerprint}:
        check.add("wrong_identity", f"rows of the run {', '.join(sorted(prints - {job.fingerprint}))}")


def _check_rows(check: ShardCheck, table: pa.Table, names: Sequence[str]) -> None:
    wrong, silent = [], []
    for row in table.to_pylist():
        if row["status"] == "ok":
            reason = mask_problem(row, names)
            if reason is not None:
                wrong.append(f"{row['image_id']} ({reason})")
            continue
        check.failed += 1
        if not (row["error_type"] and row["stage"]) or row["error_message"] is None:
            silent.append(row["image_id"])
    for kind, ids in (("wrong_mask", wrong), ("no_reason", silent)):
        if ids:
            check.add(kind, _named(ids), len(ids))


def mask_problem(row: dict[str, Any], names: Sequence[str]) -> str | None:
    """What is wrong with the mask of an ok row, or None. `names` are those of labels 0, 1, 2, ..."""
    try:
        labels = unpack_mask(row)
    except Exception as error:  # decoders raise nearly any type on damaged bytes; the reason is kept
        return f"does not decode: {type(error).__name__}: {error}"
    if labels.shape != (row["height"], row["width"]):
        return f"is {labels.shape}, the image is {row['height'], row['width']}"
    pixels = np.bincount(labels.ravel())
    if len(pixels) > len(names):
        return f"has label {len(pixels) - 1}, the class table ends at {len(names) - 1}"
    counted = {(entry["class_id"], entry["name"]): entry["pixels"] for entry in row["classes"]}
    if counted != {(label, names[label]): int(pixels[label]) for label in np.flatnonzero(pixels).tolist()}:
        return "its pixels are not those counted in `classes`"
    return None


def _named(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
    return ", ".join(ids[:NAMED]) + more
