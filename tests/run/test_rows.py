"""Reading a run back: filters keep the same rows as the slow, obvious loop over every row."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cliper.model.errors import CliperError
from cliper.pipeline.errors import FilterError
from cliper.pipeline.run.folder import Run, class_names
from cliper.pipeline.run.rows import ALL_ROWS, METADATA, RowFilter, read_tables
from cliper.pipeline.run.schema import COLUMNS
from cliper.pipeline.storage.backend import Storage
from tests.support.export_runs import HARD_IDS, Scripted, scenes, scripted_run

Row = dict[str, Any]


class Failing(Scripted):
    """Cannot segment ids with `fail`."""

    def segment(self, images: Any, image_ids: Any) -> Any:
        if any("fail" in image_id for image_id in image_ids):
            raise RuntimeError("cannot")
        return super().segment(images, image_ids)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """48 images in three shards; three of them failed."""
    ids = [*HARD_IDS[:5], "fail/1.jpg", "fail/2.jpg", "fail/3.jpg"]
    return scripted_run(
        tmp_path_factory.mktemp("rows"), scenes(48, hard_ids=ids), kind=Failing, shard={"images": 20}
    )


def rows(run: Run, keep: RowFilter = ALL_ROWS) -> list[Row]:
    return [row for table in read_tables(run, keep=keep) for row in table.to_pylist()]


def share(row: Row, names: tuple[str, ...]) -> float:
    """The largest share of the image that one of the classes covers; -1 if none is there."""
    wanted = [c for c in row["classes"] or [] if (c["name"] in names if names else c["class_id"])]
    return max((c["pixels"] / (row["width"] * row["height"]) for c in wanted), default=-1.0)


def kinds(row: Row) -> int:
    """Number of classes in an image."""
    return len([c for c in row["classes"] or [] if c["class_id"]])


def passes(row: Row, keep: RowFilter) -> bool:
    if keep.statuses and row["status"] not in keep.statuses:
        return False
    if keep.min_confidence is not None and (row["confidence"] is None or row["confidence"] < keep.min_confidence):
        return False
    if keep.min_area is not None or keep.classes:
        return share(row, keep.classes) >= (keep.min_area or 0)
    return True


def test_all_rows_are_all_columns_of_every_shard(run: Run) -> None:
    tables = list(read_tables(run))
    assert [len(table) for table in tables] == [20, 20, 8]
    assert all(table.column_names == COLUMNS.names for table in tables)
    statuses = [row["status"] for row in rows(run)]
    assert (statuses.count("ok"), statuses.count("failed")) == (45, 3)


@settings(deadline=None, max_examples=60)
@given(
    statuses=st.sampled_from([(), ("ok",), ("failed",), ("ok", "failed"), ("poison",)]),
    classes=st.lists(st.sampled_from(["Straße", "草", "yes", "background"]), unique=True).map(tuple),
    confidence=st.none() | st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    area=st.none() | st.sampled_from([0.0, 0.05, 0.3, 1.0]),
)
def test_filters_keep_the_same_rows_as_a_loop(
    run: Run, statuses: tuple[str, ...], classes: tuple[str, ...], confidence: float | None, area: float | None
) -> None:
    keep = RowFilter(statuses, classes, confidence, area)
    assert rows(run, keep) == [row for row in rows(run) if passes(row, keep)]


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("margin < 0.2", lambda row: row["margin"] is not None and row["margin"] < 0.2),
        ("starts_with(image_id, 'part1/') OR width = 1", lambda r: "part1/" in r["image_id"] or r["width"] == 1),
        ("width * height > 4000 -- large", lambda row: row["width"] * row["height"] > 4000),
        ("error_type IS NOT NULL", lambda row: row["status"] == "failed"),
        ("len(list_filter(classes, lambda c: c.class_id > 0)) > 3", lambda row: kinds(row) > 3),
    ],
)
def test_sql(run: Run, condition: str, expected: Callable[[Row], bool]) -> None:
    found = rows(run, RowFilter(statuses=(), where=condition))
    assert found == [row for row in rows(run) if expected(row)]
    assert 0 < len(found) < 48


def test_sql_and_the_other_conditions_must_all_hold(run: Run) -> None:
    keep = RowFilter(classes=("草",), min_confidence=0.3, where="width > 60")
    expected = [row for row in rows(run) if passes(row, keep) and row["width"] > 60]
    assert rows(run, keep) == expected
    assert expected


def test_requested_columns_and_shards(run: Run) -> None:
    keep = RowFilter(min_confidence=0.5)
    [table] = read_tables(run, ["width", "image_id"], keep, shards=[1])
    assert table.column_names == ["width", "image_id"]
    assert table["image_id"].to_pylist() == [row["image_id"] for row in rows(run, keep) if row in rows_of(run, 1)]
    assert list(read_tables(run, ["mask"], RowFilter(("poison",)))) == []


def rows_of(run: Run, shard: int) -> list[Row]:
    return [row for table in read_tables(run, shards=[shard]) for row in table.to_pylist()]


def test_masks_of_shards_without_a_match_are_not_read(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.parquet as pq

    asked: list[list[str]] = []
    plain = pq.ParquetFile.read

    def read(file: Any, columns: Any = None) -> Any:
        asked.append(list(columns or []))
        return plain(file, columns)

    monkeypatch.setattr(pq.ParquetFile, "read", read)
    found = rows(run, RowFilter(where="image_id = 'a/b/photo.jpg'"))
    assert [row["image_id"] for row in found] == ["a/b/photo.jpg"]
    assert ["mask" in columns for columns in asked] == [False, True, False, False]


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (RowFilter(classes=("strasse",)), "no class 'strasse'; did you mean Straße"),
        (RowFilter(classes=("xylophone",)), r"no class 'xylophone'; it has 19: Straße, 草, .*, \.\.\."),
        (RowFilter(statuses=("good",)), "no status 'good'; there are: ok, failed, poison"),
        (RowFilter(min_confidence=1.5), "minimum confidence must be between 0 and 1, not 1.5"),
        (RowFilter(min_area=-0.1), "minimum area must be between 0 and 1, not -0.1"),
        (RowFilter(min_area=float("nan")), "not nan"),
        (
            RowFilter(where="sharpness > 2"),
            "'sharpness > 2' is not valid SQL here: .*sharpness.*; columns: image_id",
        ),
        (RowFilter(where="width >"), "not valid SQL"),
        (RowFilter(where="1=1); SELECT 1; --"), "not valid SQL"),
        (RowFilter(where="width IN (SELECT count(*) FROM read_text('/etc/passwd'))"), "not valid SQL.*disabled"),
    ],
)
def test_mistakes_are_named_before_anything_is_read(run: Run, keep: RowFilter, message: str) -> None:
    with pytest.raises(FilterError, match=message):
        next(read_tables(Run("/nowhere", Storage(), run.identity), keep=keep))


def test_sql_without_duckdb_names_the_extra(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "duckdb", None)
    with pytest.raises(CliperError, match=r"pip install 'cliper\[export\]'"):
        RowFilter(where="width > 1").check(class_names(run.identity))


def test_metadata_is_everything_but_the_mask() -> None:
    assert set(COLUMNS.names) - set(METADATA) == {"mask"}


@pytest.mark.parametrize(
    "condition",
    [
        "true) OR (true",
        "true); DROP TABLE rows; --",
        "status = 'ok') UNION ALL SELECT 0 FROM (SELECT 1",
        "true, false",
        "true ORDER BY image_id",
        "image_id IN (SELECT content FROM read_text('/etc/hostname'))",
        "image_id IN (SELECT image_id FROM 'labels/*.parquet')",
        "EXISTS (SELECT 1 FROM secret_table)",
    ],
)
def test_a_condition_stays_inside_its_query(run: Run, condition: str) -> None:
    import pandas as pd  # DuckDB would find a variable of this process by its name

    secret_table = pd.DataFrame({"a": [1]})
    assert len(secret_table) == 1
    with pytest.raises(FilterError, match="is not valid SQL here"):
        rows(run, RowFilter(where=condition))


def test_a_condition_has_limited_time(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cliper.pipeline.run.rows.SQL_SECONDS", 1.0)
    endless = "(SELECT count(*) FROM range(10000000) a, range(10000000) b WHERE a.range + b.range = 7) > width"
    with pytest.raises(FilterError, match="takes more than 1 s"):
        rows(run, RowFilter(where=endless))
