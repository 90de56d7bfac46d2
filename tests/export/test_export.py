"""Exports resume after an interruption, refuse foreign folders, and are the same from any storage."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from cliper.jobs.cli import app
from cliper.model.errors import CliperError
from cliper.pipeline.errors import ExportError, FilterError, RunError
from cliper.pipeline.export.base import Exporter, Item, Plan, Record, Records
from cliper.pipeline.export.driver import LISTING, MARKER, export, find_exporter
from cliper.pipeline.export.folder import Folder
from cliper.pipeline.export.registry import EXPORTERS
from cliper.pipeline.run.check import read_labels
from cliper.pipeline.run.folder import Run, read_run
from cliper.pipeline.run.rows import RowFilter
from cliper.pipeline.run.shards import shard_file, write_shard
from cliper.pipeline.storage.backend import Storage
from cliper.pipeline.storage.uris import join
from tests.conftest import S3Server
from tests.export.test_formats import READERS, names_to_ids
from tests.run.test_rows import Failing
from tests.support.command import cliper
from tests.support.export_runs import HARD_IDS, plan_of, scenes, scripted_run, stored_masks

SHARDS = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """40 images in four shards; two failed."""
    given = scenes(40, hard_ids=[*HARD_IDS[:12], "fail/1.jpg", "fail/2.jpg"])
    return scripted_run(tmp_path_factory.mktemp("export"), given, kind=Failing, shard={"images": 10})


def content(folder: Path) -> dict[str, bytes]:
    """Every file of an export but the marker, which contains time and place."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MARKER]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


class Stopped(BaseException):
    """The process is killed."""


@pytest.mark.parametrize("name", EXPORTERS)
def test_interrupted_and_continued_equals_uninterrupted(name: str, run: Run, tmp_path: Path) -> None:
    plan = plan_of(run, name, images=True, val_share=0.2)

    def stop(done: int, total: int) -> None:
        assert total == SHARDS
        if done == 2:
            raise Stopped

    with pytest.raises(Stopped):
        export(run, plan, str(tmp_path / "out"), on_shard=stop)
    heard: list[int] = []
    done = export(run, plan, str(tmp_path / "out"), on_shard=lambda done, total: heard.append(done))
    assert heard in ([3, 4], [4], []), "finished shards, some of them ahead of the stop, are not exported again"
    assert (done.images, done.left_out) == (38, {"failed: RuntimeError": 2})
    export(run, plan, str(tmp_path / "whole"))
    whole, continued = content(tmp_path / "whole"), content(tmp_path / "out")
    if name in ("label-studio", "sagemaker"):  # they name the copied images by their place
        whole = {k: v.replace(b"/whole/", b"/out/") for k, v in whole.items()}
        whole = {k: v.replace(b"whole/images", b"out/images") for k, v in whole.items()}
    assert continued == whole
    assert not any(part.startswith(".") for part in whole), "no parts are left"


def test_a_finished_export_is_not_written_again(run: Run, tmp_path: Path) -> None:
    plan, folder = plan_of(run, "voc"), tmp_path / "out"
    first = export(run, plan, str(folder))
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    again = export(run, plan, str(folder), on_shard=lambda done, total: pytest.fail("exported again"))
    assert replace(again, seconds=0) == replace(first, seconds=0)
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_several_processes_write_the_same_as_one(run: Run, tmp_path: Path) -> None:
    for name in ("coco", "webdataset"):
        plan = plan_of(run, name)
        export(run, plan, str(tmp_path / f"{name}-1"))
        export(run, plan, str(tmp_path / f"{name}-3"), workers=3)
        assert content(tmp_path / f"{name}-1") == content(tmp_path / f"{name}-3")


def test_skipped_images_are_counted_and_listed(run: Run, tmp_path: Path) -> None:
    """Failed rows, and images that are missing, damaged or changed since they were labeled."""
    given = scenes(12, hard_ids=["0", "1", "2", "fail/3"])
    small = scripted_run(tmp_path, given, kind=Failing)
    files = sorted((tmp_path / "files").iterdir())
    files[0].unlink()
    files[1].write_bytes(b"not an image")
    files[2].write_bytes(files[5].read_bytes())
    keep = RowFilter(statuses=())
    done = export(small, plan_of(small, "voc", images=True, keep=keep), str(tmp_path / "out"))
    reasons = {"image missing": 1, "image corrupt": 1, "image changed": 1, "no mask": 1}
    assert (done.images, done.left_out) == (8, reasons)
    lines = [json.loads(line) for line in (tmp_path / "out" / LISTING).read_text().splitlines()]
    assert {line["image_id"] for line in lines if "left_out" in line} == {"0", "1", "2", "fail/3"}
    assert len(list((tmp_path / "out" / "VOCdevkit/VOC2012/SegmentationClass").iterdir())) == 8
    without = export(small, plan_of(small, "huggingface", keep=keep), str(tmp_path / "hf"))
    assert (without.images, without.left_out) == (12, {}), "its table can hold a row without a mask"


def test_only_rows_that_pass_the_filter(run: Run, tmp_path: Path) -> None:
    keep = RowFilter(classes=("草",), min_confidence=0.4, where="width > 60")
    done = export(run, plan_of(run, "coco", keep=keep), str(tmp_path))
    found = READERS["coco"](tmp_path, run)
    masks = stored_masks(run)
    assert 0 < done.images == len(found) < 30
    assert all((masks[image_id] == 2).any() for image_id in found)
    assert all(np.array_equal(masks[image_id], mask) for image_id, mask in found.items()), "other classes stay"


def test_names_do_not_depend_on_the_filter(run: Run, tmp_path: Path) -> None:
    """photo.jpg and Photo.jpg clash on some file systems; each keeps its name when exported alone."""
    export(run, plan_of(run, "voc"), str(tmp_path / "all"))
    export(run, plan_of(run, "voc", keep=RowFilter(where="image_id = 'Photo.jpg'")), str(tmp_path / "one"))
    ids = {image_id: name for name, image_id in names_to_ids_ok(tmp_path / "all").items()}
    [(name, image_id)] = names_to_ids(tmp_path / "one").items()
    assert ids[image_id] == name
    assert name.startswith("Photo~")


def names_to_ids_ok(folder: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in (folder / LISTING).read_text().splitlines()]
    return {row["name"]: row["image_id"] for row in rows if "left_out" not in row}


def test_a_folder_with_other_files_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ExportError, match=r"not empty and not an export \(it holds thesis.tex\)"):
        export(run, plan_of(run, "voc"), str(tmp_path))
    with pytest.raises(ExportError, match="not empty"):
        export(run, plan_of(run, "voc"), run.uri)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_another_export_is_refused_by_what_differs(run: Run, tmp_path: Path) -> None:
    export(run, plan_of(run, "voc"), str(tmp_path))
    cases = {
        'format was "voc", is now "coco"': plan_of(run, "coco"),
        "options.val_share was 0.0, is now 0.5": plan_of(run, "voc", val_share=0.5),
        "images_copied was false, is now true": plan_of(run, "voc", images=True),
        "filter.min_area was null, is now 0.1": plan_of(run, "voc", keep=RowFilter(min_area=0.1)),
    }
    for message, plan in cases.items():
        with pytest.raises(ExportError, match=f"{message}. Remove it, or choose another --output"):
            export(run, plan, str(tmp_path))


def test_a_run_that_has_grown_is_another_export(tmp_path: Path) -> None:
    run = scripted_run(tmp_path, scenes(30), shard={"images": 10})
    last = tmp_path / "run" / "labels" / "shard-000002.parquet"
    aside = last.rename(tmp_path / "aside")
    done = export(run, plan_of(run, "voc"), str(tmp_path / "out"))
    assert (done.images, done.shards) == (20, 2)
    aside.rename(last)
    with pytest.raises(ExportError, match="shards was 2, is now 3"):
        export(run, plan_of(run, "voc"), str(tmp_path / "out"))


def test_an_export_of_rows_that_changed_since_is_refused(tmp_path: Path) -> None:
    run = scripted_run(tmp_path, scenes(20), shard={"images": 10})
    assert export(run, plan_of(run, "voc"), str(tmp_path / "out")).shards == 2
    rows = read_labels((tmp_path / "run" / shard_file(1)).read_bytes())
    block = rows.set_column(rows.column_names.index("attempts"), "attempts", pa.array([2] * 10, pa.int32()))
    block = block.add_column(0, "shard", pa.array([1] * 10, pa.int32()))
    write_shard(block, run.storage, run.uri, rows.schema)
    with pytest.raises(ExportError, match="holds another export"):
        export(run, plan_of(run, "voc"), str(tmp_path / "out"))


def test_nothing_labeled_and_unknown_names(run: Run, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_bytes((Path(run.uri) / "run.json").read_bytes())
    with pytest.raises(RunError, match="no finished shard"):
        empty = read_run(str(tmp_path / "run"), Storage())
        export(empty, plan_of(empty, "voc"), str(tmp_path / "out"))
    with pytest.raises(ExportError, match="unknown format 'pascal'; known: coco, coco-panoptic"):
        find_exporter("pascal")
    with pytest.raises(FilterError, match="no class"):
        export(run, plan_of(run, "voc", keep=RowFilter(classes=("unicorn",))), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_new_format_is_one_entry(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe in CONTRIBUTING.md."""

    def shard(items: Iterator[Item], folder: Folder, plan: Plan, number: int) -> Iterator[Record]:
        for item in items:
            folder.write(f"{item.name}.npy", item.labels.tobytes())
            yield {"image_id": item.image_id, "name": item.name, "uri": item.uri}

    def finish(records: Records, folder: Folder, plan: Plan) -> None:
        folder.write("count.txt", str(sum(1 for _ in records)).encode())

    monkeypatch.setitem(EXPORTERS, "raw", Exporter(shard, finish))
    export(run, plan_of(run, "raw"), str(tmp_path))
    assert (tmp_path / "count.txt").read_text() == "38"


def test_an_error_while_writing_stops_the_shard(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shard's records file, its commit, must not appear if one of its files is missing."""
    plain = Storage.write

    def write(storage: Storage, uri: str, data: bytes) -> None:
        if "SegmentationClass" in uri:
            raise OSError(28, "No space left on device")
        plain(storage, uri, data)

    monkeypatch.setattr(Storage, "write", write)
    with pytest.raises(OSError, match="No space left"):
        export(run, plan_of(run, "voc"), str(tmp_path))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [MARKER]


@pytest.mark.parametrize("name", ["voc", "label-studio", "huggingface"])
def test_from_s3_to_s3(name: str, s3: S3Server, tmp_path: Path) -> None:
    """Small files, streamed files and lists; keys with %, with letters of other scripts, and long ones."""
    run = scripted_run(tmp_path, scenes(8, hard_ids=[HARD_IDS[i] for i in (0, 1, 4, 5, 7, 14)]))
    bucket = s3.bucket("export")
    for path in Path(run.uri).rglob("*"):
        if path.is_file():
            target = s3.folder / "export" / "run" / path.relative_to(run.uri)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    remote = read_run(join(bucket, "run"), Storage(s3.options))
    export(remote, plan_of(remote, name, images=True), join(bucket, "out"))
    export(run, plan_of(run, name, images=True), str(tmp_path / "out"))
    found, wanted = content(s3.folder / "export" / "out"), content(tmp_path / "out")
    assert set(found) == set(wanted)
    names_the_place = ("tasks/000000.json", "README.md")
    assert all(found[key] == wanted[key] for key in wanted if key not in names_the_place)
    if name == "label-studio":
        [task, *_] = json.loads(found["tasks/000000.json"])
        assert task["data"]["image"].startswith("s3://export/out/images/")


def test_the_command_line(run: Run, tmp_path: Path) -> None:
    """In its own process, over two workers."""
    arguments = ["export", run.uri, "--to", "yolo-seg", "--output", str(tmp_path / "out"), "--workers", "2"]
    done = cliper(*arguments, "--class", "草", "--class", "yes", "--min-area", "0.01")
    assert done.returncode == 0, done.stderr
    assert "exported  " in done.stdout
    assert "images of 4 shards" in done.stdout
    assert "trainers of this format need them: --images" in done.stdout
    assert "4 of 4 shards" in done.stderr


def test_mistakes_are_one_message(run: Run, tmp_path: Path) -> None:
    """Errors that jobs.cli prints as one line with exit code 2."""
    export(run, plan_of(run, "voc", val_share=0.1), str(tmp_path / "out"))
    refused = {
        "the format cvat has no --val-share, --test-share, --split-by and --split-list": [
            "--to",
            "cvat",
            "--val-share",
            "0.1",
        ],
        "unknown format 'nope'; known: coco,": ["--to", "nope"],
        "--split-by 'folders' matches no image id": ["--to", "coco", "--split-by", "folders"],
        "no class 'gras'": ["--to", "coco", "--class", "gras"],
        "--corrections is latest, none or a version number, not 'old'": ["--to", "coco", "--corrections", "old"],
        "filter.classes was [], is now": ["--to", "voc", "--output", str(tmp_path / "out"), "--class", "yes"],
    }
    for message, more in refused.items():
        failed = CliRunner().invoke(app, ["export", run.uri, "--output", str(tmp_path / "new"), *more])
        assert isinstance(failed.exception, CliperError), failed.exception
        assert message in str(failed.exception)
        assert "\n" not in str(failed.exception)
    assert not (tmp_path / "new").exists()


def test_help_names_every_format() -> None:
    from cliper.jobs.export import FORMATS

    assert FORMATS.split(", ") == list(EXPORTERS)
