"""Masks that people corrected, kept beside the model's and never in their place.

corrections/v0001/0123456789abcdef.parquet    the rows of one reviewed file; the name is a hash of its content

A version holds the rows of one `cliper review apply`; reading version n lays versions 1 to n over the run's own
rows, the latest correction of an image on top. A row has the columns of a label shard, the shard it stands in,
and who corrected it, when, and from which file. A person's word counts as confidence, presence and margin 1.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cliper.model.segmentation import Segmentation
from cliper.pipeline.errors import RunError
from cliper.pipeline.run.folder import Run, class_names
from cliper.pipeline.run.masks import pack_mask
from cliper.pipeline.run.schema import COLUMNS, by_name, class_entries
from cliper.pipeline.storage.backend import join

Version = Literal["latest"] | int | None

_FILE = re.compile(r"v(\d{4,})/[0-9a-f]{16}\.parquet")

SCHEMA = pa.schema(
    [
        pa.field("shard", pa.int32(), nullable=False),
        *COLUMNS,
        pa.field("corrected_by", pa.string(), metadata={"meaning": "who, as the reviewed file names them"}),
        pa.field("corrected_at", pa.timestamp("us", "UTC"), nullable=False),
        pa.field("source", pa.string(), nullable=False, metadata={"meaning": "the reviewed file"}),
        pa.field("changed", pa.bool_(), nullable=False, metadata={"meaning": "whether the mask differs"}),
    ]
)


@dataclass(frozen=True)
class Corrections:
    """The correction of each image that has one: a table of SCHEMA, one row per image."""

    rows: pa.Table

    def of_shard(self, shard: int) -> pa.Table:
        """The corrections of one shard."""
        return self.rows.filter(pc.equal(self.rows["shard"], shard))


# Schema.empty_table() would import pandas.
NO_CORRECTIONS = Corrections(pa.Table.from_batches([], SCHEMA))


def versions(run: Run) -> dict[int, list[str]]:
    """The files of each version there is, relative to the run's `corrections` folder."""
    try:
        names = [name for name, _ in run.storage.list_files(join(run.uri, "corrections"))]
    except FileNotFoundError:
        return {}
    found: dict[int, list[str]] = {}
    for name in names:
        if match := _FILE.fullmatch(name):
            found.setdefault(int(match[1]), []).append(name)
    return dict(sorted(found.items()))


def read_corrections(run: Run, version: Version = "latest") -> Corrections:
    """Corrections up to a version; none for None, or for "latest" where nothing was corrected.

    Raises RunError for a version that does not exist.
    """
    known = versions(run) if version is not None else {}
    if isinstance(version, int) and version not in known:
        listed = ", ".join(map(str, known)) or "none"
        raise RunError(f"{run.uri} has no corrections of version {version}; versions: {listed}")
    upto = version if isinstance(version, int) else max(known, default=0)
    wanted = [names for number, names in known.items() if number <= upto]
    if not wanted:
        return NO_CORRECTIONS
    return Corrections(_last_of_each_image([_read_version(run, names) for names in wanted]))


def with_corrections(table: pa.Table, corrected: pa.Table) -> pa.Table:
    """A table of label rows (any columns with `image_id`) with the corrected rows in place of the model's."""
    found = pc.index_in(table["image_id"], corrected["image_id"].combine_chunks())
    places = pc.fill_null(found, -1).to_numpy()
    both = pa.concat_tables([table, corrected.select(table.column_names).cast(table.schema)])
    return both.take(np.where(places < 0, np.arange(len(table)), places + len(table)))


def write_corrections(run: Run, rows: Sequence[Mapping[str, Any]]) -> tuple[int, bool]:
    """Store rows of SCHEMA as the next version; returns (version, whether it is new).

    The same corrections again are found by their hash and not stored twice. Two people who store at the same
    moment may share a version number; their files have different names, so nothing is lost.
    """
    content = hashlib.sha256()
    for row in sorted(rows, key=lambda row: str(row["image_id"])):
        content.update(repr((row["image_id"], row["corrected_by"], row["source"])).encode())
        content.update(row["mask"]["bytes"])
    name, known = f"{content.hexdigest()[:16]}.parquet", versions(run)
    for number, files in known.items():
        if any(file.endswith(name) for file in files):
            return number, False
    version = max(known, default=0) + 1
    table = pa.Table.from_pylist([dict(row) for row in rows], SCHEMA)
    run.storage.write_table(join(run.uri, "corrections", f"v{version:04d}", name), table)
    return version, True


def corrected_row(run: Run, row: Mapping[str, Any], labels: np.ndarray) -> dict[str, Any]:
    """A label row with the mask `labels` [height, width] and the statistics that follow from it."""
    names = class_names(run.identity)
    found = Segmentation.of(labels, len(names))  # without scores: every pixel is certain
    return (
        dict(row)
        | pack_mask(found.labels, row["mask_codec"])
        | {"classes": class_entries(found, names)}
        | {"confidence": found.confidence, "confidence_p10": found.confidence_p10, "margin": found.margin}
    )


def _read_version(run: Run, names: Sequence[str]) -> pa.Table:
    tables = [by_name(run.storage.read_table(join(run.uri, "corrections", name)), SCHEMA) for name in names]
    return pa.concat_tables(tables).sort_by("corrected_at")


def _last_of_each_image(tables: Sequence[pa.Table]) -> pa.Table:
    """Of several corrections of an image, the one of the last version."""
    rows = pa.concat_tables(tables)
    last = {image_id: place for place, image_id in enumerate(rows["image_id"].to_pylist())}
    return rows.take(pa.array(sorted(last.values()), pa.int64()))
