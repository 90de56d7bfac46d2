"""Masks that people corrected, kept beside the model's and never in their place.

corrections/v0001/0123456789abcdef.parquet    the rows of one reviewed file; the name is a hash of its content

A version holds the rows of one `cliper review apply`; reading version n lays versions 1 to n over the run's own
rows, the latest correction of an image on top. A row has the columns of a label shard, the shard it stands in,
and who corrected it, when, and from which file. A person's word counts as confidence, presence and margin 1.
"""

import hashlib
import io
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
from cliper.pipeline.storage.sealed import DamagedFileError, open_sealed, sealed_table
from cliper.pipeline.storage.uris import join

Version = Literal["latest"] | int | None

_WHICH = ["image_id", "corrected_at", "corrected_by", "mask"]
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

    Rows that are stored already, or older than the image's correction in force, are not stored. If no other is
    left, the version that holds the first of them, or the latest, is returned.
    """
    stored, newest = _stored(run)
    new = [row for row in rows if _key(row) not in stored and not _is_older(row, newest)]
    if not new:
        return next(
            (stored[_key(row)] for row in rows if _key(row) in stored), max(versions(run), default=0)
        ), False
    version = max(versions(run), default=0) + 1
    data = sealed_table(pa.Table.from_pylist([dict(row) for row in new], SCHEMA), compression="zstd")
    name = f"{hashlib.sha256(data).hexdigest()[:16]}.parquet"
    run.storage.write(join(run.uri, "corrections", f"v{version:04d}", name), data)
    return version, True


def _stored(run: Run) -> tuple[dict[tuple[Any, ...], int], dict[str, Any]]:
    """Every stored correction with its version, and the latest time of each image."""
    stored: dict[tuple[Any, ...], int] = {}
    newest: dict[str, Any] = {}
    for version, names in versions(run).items():
        for row in (
            _read_version(run, names).select(["image_id", "corrected_at", "corrected_by", "mask"]).to_pylist()
        ):
            stored.setdefault(_key(row), version)
            newest[row["image_id"]] = max(row["corrected_at"], newest.get(row["image_id"], row["corrected_at"]))
    return stored, newest


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    digest = hashlib.sha256(row["mask"]["bytes"]).hexdigest()
    return row["image_id"], row["corrected_at"], row["corrected_by"], digest


def _is_older(row: Mapping[str, Any], newest: Mapping[str, Any]) -> bool:
    return row["image_id"] in newest and row["corrected_at"] < newest[row["image_id"]]


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
    tables = []
    for name in names:
        place = join(run.uri, "corrections", name)
        try:
            tables.append(by_name(open_sealed(io.BytesIO(run.storage.read(place)), whole=True).read(), SCHEMA))
        except (DamagedFileError, pa.ArrowException, OSError, ValueError) as error:
            raise RunError(f"{place} is damaged ({error}); remove it and apply its review again") from error
    return pa.concat_tables(tables)


def _last_of_each_image(tables: Sequence[pa.Table]) -> pa.Table:
    """Of several corrections of an image, the one made last; of one time, that of the last version."""
    rows = pa.concat_tables(tables)
    rows = rows.take(pc.sort_indices(rows, [("corrected_at", "ascending")]))  # stable: versions stay in order
    last = {image_id: place for place, image_id in enumerate(rows["image_id"].to_pylist())}
    return rows.take(pa.array(sorted(last.values()), pa.int64()))
