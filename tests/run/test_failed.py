"""Failed rows are recomputed in place and recounted; on a real Ray, with interruptions."""

import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cliper.jobs.cli import app
from cliper.pipeline.config import load_classes, load_config
from cliper.pipeline.corpus.manifest import Manifest, read_manifest
from cliper.pipeline.errors import RunError
from cliper.pipeline.flow import label_corpus
from cliper.pipeline.label.job import Job
from cliper.pipeline.label.pool import Pool
from cliper.pipeline.label.stages import Task
from cliper.pipeline.run.attempts import Attempts, attempts_file
from cliper.pipeline.run.failed import (
    Failed,
    find_failed,
    forget_counts,
    merge_rows,
    require_same,
    stored_settings,
)
from cliper.pipeline.run.folder import Run, read_run
from cliper.pipeline.run.rows import read_tables
from cliper.pipeline.run.shards import shard_file
from cliper.pipeline.run.verify import verify_run
from cliper.pipeline.storage.backend import Storage
from tests.support.command import CLIPER, cliper
from tests.support.direct import label_directly
from tests.support.fakes import BROKEN, CLASSES, Brightness, Fragile, jpeg, kind, write_corpus
from tests.support.jobs import label_here
from tests.support.labeled import label_small, rows_of

POOL = Pool(actors=1, cpus_per_actor=1, gpus_per_actor=0)


def manifest_of(run: Run) -> Manifest:
    manifest = read_manifest(run.storage, run.uri)
    assert manifest is not None
    return manifest


def failed_of(run: Run, *error_types: str) -> dict[int, Failed]:
    return find_failed(run, manifest_of(run), error_types)


def retry_small(run: Run, failed: dict[int, Failed], factory: Any = Brightness) -> None:
    """Retry failed rows with the flow's stages, without Ray."""
    label_here(stored_job(run, factory), [Task(shard, chosen) for shard, chosen in failed.items()])


def stored_job(run: Run, factory: Any) -> Job:
    config, classes = stored_settings(run)
    return Job(run, manifest_of(run), config, classes, kind(factory), "fake")


def everything_again(corpus: Path, output: Path, still: set[int], shard: dict[str, int]) -> Run:
    """A new run over the whole corpus as it is now; images still broken are put right only while it is listed."""
    paths = {i: corpus / f"{i:02d}.jpg" for i in still}
    broken = {path: path.read_bytes() if path.exists() else None for path in paths.values()}
    for i, path in paths.items():
        path.write_bytes(jpeg(i))
    label_small(corpus, output, shards=[], shard=shard)
    for path, data in broken.items():
        path.unlink() if data is None else path.write_bytes(data)
    return label_small(corpus, output, shard=shard)


def compared(run: Run) -> list[dict[str, Any]]:
    """Rows without how often they were tried, and why they failed: a new run has listed other sizes."""
    aside = ("attempts", "stage", "error_type", "error_message")
    return [{name: value for name, value in row.items() if name not in aside} for row in rows_of(run)]


@settings(max_examples=15, deadline=None)
@given(
    gone=st.sets(st.integers(0, 11)),
    damaged=st.sets(st.integers(0, 11)),
    still=st.sets(st.integers(0, 11)),
    shard_images=st.integers(1, 12),
)
def test_retrying_gives_what_labeling_everything_again_gives(
    tmp_path_factory: pytest.TempPathFactory, gone: set[int], damaged: set[int], still: set[int], shard_images: int
) -> None:
    """Some images are missing, some damaged; all but `still` are repaired, and the run is retried."""
    folder = tmp_path_factory.mktemp("retried")
    corpus, names = folder / "corpus", [f"{i:02d}.jpg" for i in range(12)]
    corpus.mkdir()
    for i, name in enumerate(names):
        (corpus / name).write_bytes(jpeg(i)[:300] if i in damaged else jpeg(i))
    shard = {"images": shard_images}
    run = label_small(corpus, folder / "run", shards=[], shard=shard)
    for i in gone:
        (corpus / names[i]).unlink()
    label_small(corpus, folder / "run", shard=shard)
    broken = gone | damaged
    assert {i for failed in failed_of(run).values() for i in failed.image_ids} == {names[i] for i in broken}
    for i in broken - still:
        (corpus / names[i]).write_bytes(jpeg(i))
    retry_small(run, failed_of(run))
    assert compared(run) == compared(everything_again(corpus, folder / "again", broken & still, shard))
    assert [row["attempts"] for row in rows_of(run)] == [2 if i in broken else 1 for i in range(12)]
    assert verify_run(run).whole


def rows(*status: str, mark: str = "old") -> pa.Table:
    return pa.table(
        {"image_id": [str(i) for i in range(len(status))], "status": status, "mark": [mark] * len(status)}
    )


def test_good_rows_are_never_replaced() -> None:
    """A repeated task may find that an image it had labeled is now missing."""
    old, new = rows("ok", "failed", "failed", "poison"), rows("failed", "ok", mark="new")
    assert merge_rows(old, new).column("mark").to_pylist() == ["old", "new", "old", "old"]
    assert merge_rows(old, new.slice(0, 0)).equals(old)
    assert merge_rows(merge_rows(old, new), new).equals(merge_rows(old, new))


def test_chosen_types_on_ray(ray_local: None, tmp_path: Path) -> None:
    """First the missing ones, which fail again; then all, after the file is restored and the poison removed."""
    corpus = tmp_path / "corpus"
    write_corpus(corpus, 20, broken_each=1)
    (corpus / "part0" / "photo-00000.jpg").rename(corpus / "part0" / "kill.jpg")
    (corpus / "part1" / "photo-00001.jpg").rename(corpus / "part1" / "raise.jpg")
    run = label_small(corpus, tmp_path / "run", shards=[])
    (corpus / "part1" / "photo-00008.jpg").rename(tmp_path / "aside.jpg")
    deaths = Attempts(run.storage, attempts_file(run.uri, 0), 5, Counter({"part0/kill.jpg": 2}))
    deaths.note(None)  # as if the image had killed its process already
    label_small(corpus, tmp_path / "run", factory=Fragile)
    first = {row["image_id"]: row for row in rows_of(run)}
    assert first["part0/kill.jpg"]["status"] == "poison"

    def retried(factory: Any, *error_types: str) -> dict[str, dict[str, Any]]:
        again = failed_of(run, *error_types)
        tasks = [Task(shard, chosen) for shard, chosen in again.items()]
        done = list(label_corpus(stored_job(run, factory), tasks, POOL))
        assert sorted(summary["shard"] for summary in done) == list(again)
        return {row["image_id"]: row for row in rows_of(run)}

    once = retried(Fragile, "missing")
    gone = once.pop("part1/photo-00008.jpg")
    assert (gone["error_type"], gone["attempts"]) == ("missing", 2)
    assert once.items() <= first.items()
    (tmp_path / "aside.jpg").rename(corpus / "part1" / "photo-00008.jpg")
    again = retried(Brightness)
    assert {row["error_type"] for row in again.values()} == {None, *BROKEN}
    assert again["part1/photo-00008.jpg"]["attempts"] == 3
    assert again["part0/kill.jpg"]["attempts"] == first["part0/kill.jpg"]["attempts"] + 1
    fine = {name: row for name, row in first.items() if row["status"] == "ok"}
    assert fine.items() <= again.items()
    assert verify_run(run).whole


def test_other_weights_or_another_version_are_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", 3)
    run = label_small(tmp_path / "corpus", tmp_path / "run")
    config, classes = stored_settings(run)
    require_same(run, config, classes, {})
    assert classes == CLASSES
    with pytest.raises(RunError, match=r"was labeled differently: weights.backbone was null, is now \"abc\""):
        require_same(run, config, classes, {"backbone": "abc"})


def test_damaged_files_are_named_before_anything_is_done(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", 10, broken_each=1)
    run = label_small(tmp_path / "corpus", tmp_path / "run")
    Path(run.uri, shard_file(1)).write_bytes(b"PAR1")
    with pytest.raises(RunError, match=r"labels/shard-000001.parquet of .* is damaged .*cliper verify --repair"):
        failed_of(run)


def test_counts_of_changed_shards_are_removed(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", 10)
    run = label_small(tmp_path / "corpus", tmp_path / "run")
    names = ["voc/counts/shard-000000.parquet", "voc/counts/shard-000001.parquet", "voc/evaluation.json"]
    names += ["voc/cliper/metrics.json", "other/counts/shard-000000.parquet", "other/mmseg/metrics.json"]
    for name in names:
        run.storage.write(f"{run.uri}/evaluation/{name}", b"x")
    forget_counts(run, [1])
    left = {name for name, _ in run.storage.list_files(f"{run.uri}/evaluation")}
    assert set(names) - left == {"voc/counts/shard-000001.parquet", "voc/cliper/metrics.json"}


def times(output: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (output / "labels").glob("shard-*")}


def test_the_command_killed_on_the_way_and_run_again(
    settings: dict[str, str], ray_local: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of 24 images in 6 shards, 12 are missing; they come back, and a retry is killed at its first shard."""
    output, corpus = tmp_path / "run", tmp_path / "corpus"
    write_corpus(corpus, 24)
    images = sorted(corpus.rglob("*.jpg"))
    (tmp_path / "list.csv").write_text("uri\n" + "".join(f"{path}\n" for path in images))
    for path in images[::2]:
        path.rename(f"{path}.away")
    config, classes = load_config(settings["--config"]), load_classes(settings["--classes"])
    run = label_directly(str(tmp_path / "list.csv"), str(output), config, classes)
    assert failed_of(run)
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    for path in images[::2]:
        Path(f"{path}.away").rename(path)
    before = times(output)
    process = subprocess.Popen([CLIPER, "retry", str(output)], start_new_session=True, stderr=subprocess.PIPE)
    while process.poll() is None and times(output) == before:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert verify_run(read_run(str(output), Storage())).counts.keys() <= {"orphans"}, "a temporary file at most"
    done = cliper("retry", str(output))
    assert (done.returncode, "left      no row failed in these shards" in done.stdout) == (0, True), (
        done.stdout + done.stderr
    )
    cleaned = CliRunner().invoke(app, ["verify", str(output), "--clean", "--workers", "1"])
    assert (cleaned.exit_code, cleaned.stdout.splitlines()[-1]) == (0, "whole     yes"), cleaned.stdout
    assert [row["attempts"] for table in read_tables(run) for row in table.to_pylist()] == [2, 1] * 12
    assert CliRunner().invoke(app, ["retry", str(output)]).stdout == "nothing to retry: no row failed\n"
