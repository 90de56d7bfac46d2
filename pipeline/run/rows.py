"""Read the rows of a run back, shard by shard: only the columns asked for, only the rows that pass a filter."""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Timer

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cliper.pipeline.errors import FilterError, RunError
from cliper.pipeline.extras import require
from cliper.pipeline.run.corrections import NO_CORRECTIONS, Corrections, with_corrections
from cliper.pipeline.run.folder import Run, class_names
from cliper.pipeline.run.reader import labeled_shards, open_shard
from cliper.pipeline.run.schema import COLUMNS, by_name, label_columns, require_label_file

SQL_SECONDS = 30.0  # for one condition over one shard
# A condition reads the rows and nothing else: no files, no network, no variables of this process.
_SQL_SETTINGS = (
    "enable_external_access = false",
    "python_enable_replacements = false",
    "memory_limit = '1GB'",
    "lock_configuration = true",
)
STATUSES = ("ok", "failed", "poison")
METADATA = tuple(name for name in COLUMNS.names if name != "mask")


@dataclass(frozen=True)
class RowFilter:
    """Which rows to take; every condition that is given must hold.

    `classes`: at least one of these class names is in the mask. `min_confidence`: the image's mean, 0 to 1.
    `min_area`: share of the image, 0 to 1, that one of `classes` (any class but background if there are none)
    covers. `where`: an SQL condition over the metadata columns (all but `mask`), evaluated by DuckDB.
    """

    statuses: tuple[str, ...] = ("ok",)  # none: rows of every status
    classes: tuple[str, ...] = ()
    min_confidence: float | None = None
    min_area: float | None = None
    where: str | None = None

    def check(self, known: Sequence[str]) -> None:
        """Raise FilterError for an unknown class or status, a bound outside 0 to 1, or SQL that does not parse."""
        unknown = [name for name in self.classes if name not in known and name != "background"]
        if unknown:
            raise FilterError(f"the run has no class '{unknown[0]}'; {_suggest(unknown[0], known)}")
        strange = [status for status in self.statuses if status not in STATUSES]
        if strange:
            raise FilterError(f"there is no status '{strange[0]}'; there are: {', '.join(STATUSES)}")
        for name, bound in (("confidence", self.min_confidence), ("area", self.min_area)):
            if bound is not None and not 0 <= bound <= 1:
                raise FilterError(f"the minimum {name} must be between 0 and 1, not {bound:g}")
        if self.where is not None:
            _sql(pa.Table.from_pylist([], COLUMNS.remove(COLUMNS.get_field_index("mask"))), self.where)

    def rows(self, metadata: pa.Table) -> np.ndarray:
        """Places, int64 [n] ascending, of the rows of a table of METADATA that pass."""
        keep = np.ones(len(metadata), dtype=bool)
        if self.statuses:
            keep &= pc.is_in(metadata["status"], pa.array(self.statuses)).to_numpy(zero_copy_only=False)
        if self.min_confidence is not None:
            above = pc.greater_equal(metadata["confidence"], self.min_confidence)
            keep &= pc.fill_null(above, False).to_numpy(zero_copy_only=False)
        if self.classes or self.min_area is not None:
            keep &= self._has_classes(metadata)
        if self.where is not None:
            passed = np.zeros(len(metadata), dtype=bool)
            passed[_sql(metadata, self.where)] = True
            keep &= passed
        return np.flatnonzero(keep)

    def _has_classes(self, metadata: pa.Table) -> np.ndarray:
        """Whether a wanted class covers enough of each image, bool [n]."""
        column = metadata["classes"].combine_chunks()
        entries = pc.list_flatten(column)
        owner = pc.list_parent_indices(column).to_numpy()
        if self.classes:
            wanted = pc.is_in(pc.struct_field(entries, "name"), pa.array(self.classes))
        else:
            wanted = pc.greater(pc.struct_field(entries, "class_id"), 0)
        pixels = pc.struct_field(entries, "pixels").to_numpy(zero_copy_only=False)
        size = pc.multiply(metadata["width"].cast(pa.int64()), metadata["height"].cast(pa.int64()))
        area = np.maximum(pc.fill_null(size, 1).to_numpy(), 1)
        enough = wanted.to_numpy(zero_copy_only=False) & (pixels / area[owner] >= (self.min_area or 0.0))
        found = np.zeros(len(metadata), dtype=bool)
        found[owner[enough]] = True
        return found


ALL_ROWS = RowFilter(statuses=())
LABELED = RowFilter()


def read_tables(
    run: Run,
    columns: Sequence[str] | None = None,
    keep: RowFilter = ALL_ROWS,
    shards: Sequence[int] | None = None,
    corrections: Corrections = NO_CORRECTIONS,
) -> Iterator[pa.Table]:
    """Yield one table per finished shard, in shard order, with `columns` (all if None) of the rows that pass.

    Holds one shard at a time. Masks are not read where no row of a shard passes; shards without such a row
    yield nothing. `corrections` (of read_corrections) take the place of the model's rows before the filter.
    Raises FilterError, see RowFilter.check, or RunError for a damaged or foreign file.
    """
    keep.check(class_names(run.identity))
    wanted = list(COLUMNS.names if columns is None else columns)
    for shard in labeled_shards(run) if shards is None else shards:
        with open_shard(run, shard) as file:
            table = _read_shard(file, wanted, keep, corrections.of_shard(shard))
        if len(table):
            yield table


def _read_shard(file: pq.ParquetFile, columns: list[str], keep: RowFilter, corrected: pa.Table) -> pa.Table:
    if len(corrected):
        table = with_corrections(_read(file, COLUMNS.names), corrected)
        return table.take(keep.rows(table.select(METADATA))).select(columns)
    if keep == ALL_ROWS:
        return _read(file, columns)
    metadata = _read(file, METADATA)
    places = keep.rows(metadata)
    light = [name for name in columns if name != "mask"]
    if len(light) == len(columns) or not len(places):
        return metadata.select(light).take(places)
    return _read(file, columns).take(places)


def _read(file: pq.ParquetFile, columns: Sequence[str]) -> pa.Table:
    """Columns of a label file that an older version may have written: nulls for those it lacks."""
    try:
        require_label_file(file.schema_arrow)
    except ValueError as error:
        raise RunError(f"a file of the run's labels cannot be read: {error}; `cliper verify` names it") from error
    there = [name for name in columns if name in file.schema_arrow.names]
    return by_name(file.read(there), label_columns(columns))


def _suggest(name: str, known: Sequence[str]) -> str:
    """Names close to one that does not exist, or the first few."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"it has {len(known)}: {', '.join(known[:10])}{', ...' if len(known) > 10 else ''}"


def _sql(metadata: pa.Table, condition: str) -> np.ndarray:
    """Places of the rows for which an SQL condition holds."""
    require("export", "an SQL condition", "duckdb")
    import duckdb

    rows = metadata.append_column("_place", pa.array(np.arange(len(metadata)), pa.int64()))
    connection = duckdb.connect()
    stop = Timer(SQL_SECONDS, connection.interrupt)
    try:
        for setting in _SQL_SETTINGS:
            connection.execute(f"SET {setting}")
        stop.start()
        # One expression and nothing else: text that closes a parenthesis or goes on after it does not parse.
        holds = duckdb.SQLExpression(condition)
        return (
            connection.from_arrow(rows)
            .filter(holds)
            .select("_place")
            .order("_place")
            .fetchnumpy()["_place"]
            .astype(np.int64)
        )
    except duckdb.InterruptException as error:
        raise FilterError(f"the condition '{condition:.200}' takes more than {SQL_SECONDS:g} s a shard") from error
    except (duckdb.Error, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[0].rstrip("!.")
        raise FilterError(
            f"the condition '{condition:.200}' is not valid SQL here: {reason}; columns: {', '.join(METADATA)}"
        ) from error
    finally:
        stop.cancel()
        connection.close()
