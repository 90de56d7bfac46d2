"""Verification finds every kind of damage, each made on purpose in a real run."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cliper.jobs.cli import app
from cliper.pipeline.errors import RunError
from cliper.pipeline.run.check import ShardCheck, ShardJob, check_shard
from cliper.pipeline.run.folder import Run, class_names, read_run
from cliper.pipeline.run.masks import pack_mask, unpack_mask
from cliper.pipeline.run.shards import encode, shard_file
from cliper.pipeline.run.verify import KINDS, verify_run
from cliper.pipeline.storage.backend import Storage
from cliper.pipeline.storage.uploads import incomplete_uploads
from tests.conftest import S3Server
from tests.support.fakes import write_corpus
from tests.support.labeled import label_small

IMAGES, SHARDS = 45, 6  # 8 a shard; 5 broken ones among them


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verified")
    write_corpus(folder / "corpus", IMAGES, broken_each=1)
    label_small(folder / "corpus", folder / "run")
    return folder / "run"


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Run:
    """A copy to damage."""
    shutil.copytree(original, tmp_path / "run")
    return read_run(str(tmp_path / "run"), Storage())


def file_of(run: Run, shard: int) -> Path:
    return Path(run.uri, shard_file(shard))


def found(run: Run) -> dict[str, int]:
    return dict(verify_run(run, workers=1).counts)


def test_a_whole_run_is_whole(original: Path) -> None:
    for processes in (1, 2):  # two are not started for six shards; see the next test
        report = verify_run(read_run(str(original), Storage()), processes)
        assert report.whole
        assert (report.shards, report.images, report.rows, report.failed) == (SHARDS, IMAGES, IMAGES, 5)


def test_processes_find_the_same(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", 18)
    run = label_small(tmp_path / "corpus", tmp_path / "run", shard={"images": 1})
    file_of(run, 3).write_bytes(file_of(run, 3).read_bytes()[:-100])
    file_of(run, 17).unlink()
    alone, together = verify_run(run, workers=1), verify_run(run, workers=2)
    assert alone.to_json() == together.to_json()
    assert dict(together.counts) == {"unreadable": 1, "unfinished": 1, "missing": 2}


def rewritten(run: Run, shard: int, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    """Replace a shard's file by one with other rows and a digest that fits them, as a faulty tool would."""
    table = pq.read_table(file_of(run, shard))
    rows = change(table.to_pylist())
    file_of(run, shard).write_bytes(encode(pa.Table.from_pylist(rows, table.schema)))


def test_rows_that_are_missing_doubled_foreign_or_in_another_order(run: Run) -> None:
    rewritten(run, 0, lambda rows: rows[:-2])
    rewritten(run, 1, lambda rows: [*rows, rows[0], rows[0], rows[1]])
    rewritten(run, 2, lambda rows: rows[::-1])
    rewritten(run, 3, lambda rows: [rows[0] | {"image_id": "elsewhere.jpg"}, *rows[1:]])
    assert found(run) == {"missing": 3, "doubled": 3, "misplaced": 1, "foreign": 1}


def test_rows_with_another_uri(run: Run) -> None:
    rewritten(
        run, 4, lambda rows: [*rows[:6], *(row | {"uri": f"/elsewhere/{row['image_id']}"} for row in rows[6:])]
    )
    assert found(run) == {"other_uri": 2}


def test_two_files_swapped(run: Run) -> None:
    first, second = file_of(run, 1), file_of(run, 2)
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    assert found(run) == {"missing": 16, "foreign": 16, "wrong_identity": 2}


def test_rows_changed_behind_the_digest(run: Run) -> None:
    table = pq.read_table(file_of(run, 2))
    table = table.set_column(table.schema.get_field_index("confidence"), table.schema.field("confidence"),
                             pa.array([0.5] * len(table), pa.float32()))  # fmt: skip
    pq.write_table(table, file_of(run, 2))
    table = pq.read_table(file_of(run, 3))
    pq.write_table(table.replace_schema_metadata(
        {k: v for k, v in table.schema.metadata.items() if k != b"cliper.digest"}), file_of(run, 3))  # fmt: skip
    assert found(run) == {"wrong_checksum": 2}
    assert any(problem.detail == "it has no digest" for problem in verify_run(run).problems)


def test_masks_that_do_not_fit_their_row(run: Run) -> None:
    def change(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        mask = unpack_mask(rows[1])
        rows[1] |= pack_mask(mask[:-1], "png")
        rows[2]["mask"]["bytes"] = rows[2]["mask"]["bytes"][:50]
        rows[3] |= pack_mask(mask * 0 + 200, "png")
        rows[4]["classes"] = rows[4]["classes"][:-1]
        rows[5]["mask_codec"] = "jpeg"
        return rows

    rewritten(run, 1, change)
    rewritten(run, 0, lambda rows: [rows[0] | {"error_type": None}, *rows[1:]])  # a broken image: it failed
    assert found(run) == {"wrong_mask": 5, "no_reason": 1}
    details = " ".join(problem.detail for problem in verify_run(run).problems)
    assert "is (47, 64), the image is (48, 64)" in details


def test_another_runs_file(run: Run, tmp_path: Path, original: Path) -> None:
    corpus = original.parent / "corpus"
    other = label_small(corpus, tmp_path / "other", shards=[2], max_pixels=1_000_000)
    shutil.copy(file_of(other, 2), file_of(run, 2))
    assert found(run) == {"wrong_identity": 1}
    rewritten(run, 3, lambda rows: [rows[0] | {"run_fingerprint": other.fingerprint}, *rows[1:]])
    assert found(run) == {"wrong_identity": 2}


def test_damaged_and_missing_manifests(run: Run) -> None:
    part = Path(run.uri, "manifest", "part-00000.parquet")
    part.write_bytes(part.read_bytes()[:200])
    assert found(run) == {"unreadable": 1, "missing": IMAGES}
    shutil.rmtree(part.parent)
    with pytest.raises(RunError, match="has no manifest"):
        verify_run(run)


def job_of(run: Run, shard: int) -> ShardJob:
    ids = pq.read_table(file_of(run, shard), columns=["image_id"]).column(0).to_pylist()
    return ShardJob(run.storage, run.uri, shard, ids, run.fingerprint, class_names(run.identity))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_damaged_byte_is_found_or_harmless(
    original: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Either the check finds it, or the rows are still exactly those that were written."""
    run = read_run(str(original), Storage())
    job, good = job_of(run, 1), file_of(run, 1).read_bytes()
    place = data.draw(st.integers(0, len(good) - 1))
    bad = bytearray(good)
    bad[place] ^= data.draw(st.integers(1, 255))
    copy = tmp_path_factory.mktemp("damaged")
    (copy / "labels").mkdir()
    (copy / shard_file(1)).write_bytes(bad)
    check: ShardCheck = check_shard(ShardJob(**vars(job) | {"run_uri": str(copy)}))
    if not check.problems:
        assert pq.read_table(io.BytesIO(bytes(bad))).equals(pq.read_table(io.BytesIO(good)))


def test_orphans_are_listed_and_only_ours_removed(run: Run) -> None:
    folder = Path(run.uri)
    ours = [f"labels/.shard-000001.parquet.{'0a' * 16}.tmp", "attempts/shard-000002.json"]
    others = ["labels/notes.txt", f"labels/shard-{SHARDS:06d}.parquet", "labels/shard-0000001.parquet"]
    for name in [*ours, *others, "thesis.tex"]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    assert found(run) == {"orphans": 5}
    done = CliRunner().invoke(app, ["verify", run.uri, "--clean", "--workers", "1"])
    assert done.exit_code == 1
    assert all(f"removed {name}" in done.stdout for name in ours)
    assert all(f"orphans: {name}" in done.stdout for name in others)
    assert found(run) == {"orphans": 3}
    assert all((folder / name).exists() for name in [*others, "thesis.tex"])


def test_s3_with_an_upload_that_was_never_completed(original: Path, s3: S3Server) -> None:
    write_corpus(s3.folder / "corpus" / "images", 6)
    storage = Storage(s3.options)
    uri = f"{s3.bucket('verified')}/run"
    run = label_small("s3://corpus/images", uri, storage)
    filesystem, _ = storage.filesystem(uri)
    for key in ("run/labels/shard-000000.parquet", "elsewhere/file"):
        filesystem.call_s3("create_multipart_upload", Bucket="verified", Key=key)
    report = verify_run(run, workers=1)
    assert dict(report.counts) == {"orphans": 1}
    [problem] = report.problems
    assert (problem.file, problem.detail) == ("labels/shard-000000.parquet", "an upload that was never completed")
    options = [part for pair in s3.options.items() for part in ("--storage-option", "=".join(pair))]
    done = CliRunner().invoke(app, ["verify", uri, "--clean", *options])
    assert done.exit_code == 0, done.stdout
    assert s3.secret not in done.stdout
    assert [key for key, _ in incomplete_uploads(storage, "s3://verified")] == ["elsewhere/file"]


def test_the_command_prints_the_problems(run: Run, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["verify", run.uri, "--workers", "1"])
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (0, "whole     yes")
    file_of(run, 4).unlink()
    done = CliRunner().invoke(app, ["verify", run.uri, "--workers", "1", "--json"])
    assert done.exit_code == 1
    assert "unfinished             1  shards without a file" in done.stderr
    report = json.loads(done.stdout)
    assert (report["whole"], report["missing"], report["unfinished"]) == (False, 8, 1)
    assert KINDS.keys() <= report.keys()
