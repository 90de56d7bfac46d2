"""A run folder that version 0.1 wrote passes every command, also when the schema of a later version has grown.

tests/data/run_0_1: four images in two shards, the last one cut off (failed), the first one corrected.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

import cliper
from cliper.jobs.cli import app
from cliper.jobs.evaluations import _finish, _stored_setting
from cliper.jobs.options import Resources
from cliper.jobs.retry import open_stored
from cliper.pipeline.dataset import MaskDataset
from cliper.pipeline.evaluate.evaluation import open_evaluation, require_labeled
from cliper.pipeline.evaluate.prepare.write import prepare
from cliper.pipeline.label.stages import Task
from cliper.pipeline.run import schema
from cliper.pipeline.run.failed import find_failed
from cliper.pipeline.run.folder import class_names, read_run
from cliper.pipeline.run.masks import unpack_mask
from cliper.pipeline.run.verify import verify_run
from cliper.pipeline.storage.backend import Storage
from tests.conftest import ROOT
from tests.support.jobs import label_here

DATA = ROOT / "tests" / "data" / "run_0_1"
GROWN = "sharpness" in schema.SINCE


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A copy of the run and its images, the manifest pointing at the copies."""
    shutil.copytree(DATA, tmp_path, dirs_exist_ok=True)
    part = tmp_path / "run" / "manifest" / "part-00000.parquet"
    table = pq.read_table(part)
    uris = [str(tmp_path / "images" / Path(uri).name) for uri in table["uri"].to_pylist()]
    moved = table.set_column(table.column_names.index("uri"), table.schema.field("uri"), pa.array(uris))
    pq.write_table(moved, part, row_group_size=2)
    return tmp_path


def command(*words: str) -> str:
    done = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_verify_and_status(home: Path) -> None:
    assert "whole     yes" in command("verify", str(home / "run"))
    status = json.loads(command("status", str(home / "run"), "--json"))
    assert (status["state"], status["images_done"], status["failures"]) == ("done", 4, {"corrupt": 1})


def test_python_reads_it(home: Path) -> None:
    run = cliper.open_run(str(home / "run"))
    rows = list(run.rows())
    assert [row["status"] for row in rows] == ["ok", "ok", "ok", "failed"]
    assert (run.mask("scene-1.jpg")[:8] == 1).all(), "the correction"
    assert run.table().column_names == [name for name in schema.COLUMNS.names if name != "mask"]
    if GROWN:
        assert run.table(["sharpness"])["sharpness"].null_count == 4
        assert len(run.table(where="sharpness IS NULL")) == 4
    examples = list(MaskDataset(run.run, shuffle=False))
    assert [example.image_id for example in examples] == ["scene-1.jpg", "scene-2.jpg", "scene-3.jpg"]
    assert tuple(examples[0].mask.shape) == (72, 96)


def test_export_report_and_review(home: Path) -> None:
    run = str(home / "run")
    command("export", run, "--to", "coco", "--output", str(home / "coco"))
    assert len(json.loads((home / "coco" / "annotations" / "instances_train.json").read_text())["images"]) == 3
    command("export", run, "--to", "huggingface", "--output", str(home / "hf"), "--workers", "1")
    features = pq.read_schema(next((home / "hf" / "data").glob("*.parquet"))).names
    assert ("sharpness" in features) is GROWN
    command("report", run, "--output", str(home / "report.html"))
    assert "scene-2.jpg" in (home / "report.html").read_text()
    command("review", "pick", run, "--count", "2", "--output", str(home / "review"))
    assert len(json.loads((home / "review" / "tasks.json").read_text())) == 2


def test_retry_puts_new_rows_next_to_old_ones(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cliper.pipeline.run.folder.version", lambda name: "0.1.0")  # retry asks for the same one
    run = read_run(str(home / "run"), Storage())
    shutil.copy(home / "scene-4-whole.jpg", home / "images" / "scene-4.jpg")
    job = open_stored(run, Resources(device="cpu"))
    [(shard, failed)] = find_failed(run, job.manifest).items()
    assert (shard, failed.image_ids) == (1, ["scene-4.jpg"])
    before = pq.read_table(home / "run/labels/shard-000001.parquet")
    label_here(job, [Task(shard, failed)])
    after = pq.read_table(home / "run/labels/shard-000001.parquet")
    assert after["status"].to_pylist() == ["ok", "ok"]
    assert after["attempts"].to_pylist() == [1, 2]
    assert after.column_names == schema.COLUMNS.names
    assert after.select(before.column_names).slice(0, 1).equals(before.slice(0, 1))
    assert schema.file_version(after.schema) == schema.SCHEMA_VERSION
    assert verify_run(run).whole


def test_evaluate_counts_it(home: Path) -> None:
    run = read_run(str(home / "run"), Storage())
    root = home / "truth"
    shutil.copytree(home / "images", root / "images")
    shutil.copy(home / "scene-4-whole.jpg", root / "images" / "scene-4.jpg")
    (root / "labels").mkdir()
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in class_names(run.identity)))
    for row in cliper.open_run(run.uri).rows():
        labels = np.zeros((72, 96), np.uint8) if row["mask"] is None else unpack_mask(row)
        Image.fromarray(labels).save(root / "labels" / f"{Path(row['image_id']).stem}.png")
    prepared = prepare("folder", root, str(home / "prepared"), Storage())
    require_labeled(run)
    evaluation = open_evaluation(run, prepared, count_failed=True)
    counted = evaluation.counter().stage(pa.table({"shard": evaluation.uncounted_shards()}))
    assert counted["problem"].null_count == len(counted) == 2
    results, page = _finish(evaluation, _stored_setting(run, None, None, None))
    assert results["model"] == "embedded:tiny"
    assert Path(page).stat().st_size > 1000


@pytest.mark.skipif(GROWN, reason="this is the grown schema")
def test_all_of_it_with_one_more_column() -> None:
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "tests.support.grown", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(tests, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "5 passed, 1 skipped" in done.stdout
