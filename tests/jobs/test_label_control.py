"""Control of a run by commands: one command at a time, failure limits, full disks, stops, new runs."""

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cliper.jobs.common import execute
from cliper.jobs.options import Resources, with_overrides
from cliper.jobs.progress import FailureLimit
from cliper.model.errors import ConfigError
from cliper.model.segmentation import Segmentation
from cliper.pipeline.config import JobConfig, load_config
from cliper.pipeline.corpus.manifest import fitting_shards
from cliper.pipeline.corpus.sources import Entry
from cliper.pipeline.corpus.sources.tables import entries_of, tables_of
from cliper.pipeline.errors import ResourceError, StorageError, TooManyFailuresError
from cliper.pipeline.label import segmenters
from cliper.pipeline.label.job import open_job
from cliper.pipeline.run.attempts import Attempts
from cliper.pipeline.run.folder import read_run
from cliper.pipeline.run.heartbeat import read_heartbeat
from cliper.pipeline.run.rows import read_tables
from cliper.pipeline.run.status import read_status
from cliper.pipeline.storage.backend import Storage
from tests.support.command import all_rows
from tests.support.fakes import CLASSES, Brightness, kind, write_corpus
from tests.support.faulty_s3 import FaultyS3
from tests.support.jobs import this_ray


@pytest.fixture
def brightness(monkeypatch: pytest.MonkeyPatch, ray_local: None) -> Iterator[None]:
    """`execute` on the session's Ray, with a segmenter that is fast and predictable."""
    monkeypatch.setitem(segmenters.SEGMENTERS, "brightness", kind(Brightness))
    yield


def run(
    corpus: Path | str,
    output: Path | str,
    limit: str | None = None,
    storage: Storage = Storage(),  # noqa: B008
    wait: float = 60,
    **settings: Any,
) -> None:
    """Run the job of `cliper label` with a config of `settings`."""
    # A single CPU, since Ray may keep the actor of an aborted run until the end of the session.
    fixed = {"segmenter": "brightness", "resources": {"actors": 1, "cpus_per_actor": 1}}
    config = JobConfig.model_validate(fixed | settings)
    job = open_job(str(corpus), str(output), config, CLASSES, storage)
    execute(job, this_ray(wait), None if limit is None else FailureLimit.parse(limit))


def test_too_many_failures_stop_the_run_and_a_higher_limit_continues_it(brightness: None, tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", 60, broken_each=4)  # 20 broken ones, which come first
    output = tmp_path / "run"
    with pytest.raises(TooManyFailuresError, match=r"10 of 10 images failed .* than --max-failures 5; labeled"):
        run(tmp_path / "corpus", output, "5", shard={"images": 10})
    kept = {path.name: path.stat().st_mtime_ns for path in (output / "labels").iterdir()}
    assert 1 <= len(kept) < 6
    run(tmp_path / "corpus", output, "20", shard={"images": 10})
    assert len(all_rows(output)) == 60
    assert kept.items() <= {path.name: path.stat().st_mtime_ns for path in (output / "labels").iterdir()}.items()


@pytest.mark.parametrize(
    ("text", "images", "failed", "left", "stops"),
    [
        ("5", 10, 5, 90, False),
        ("5", 10, 6, 90, True),
        ("0", 10, 1, 90, True),
        ("10%", 99, 99, 1, False),  # too few to check a share
        ("10%", 100, 11, 900, True),
        ("10%", 100, 10, 900, False),
        ("10%", 10, 2, 0, True),  # but these are all
        ("100%", 500, 500, 0, False),
    ],
)
def test_failure_limits(text: str, images: int, failed: int, left: int, stops: bool) -> None:
    progress: Any = SimpleNamespace(
        failures=Counter({"corrupt": failed}), images=images, before=7, total=7 + images + left
    )
    try:
        FailureLimit.parse(text).check(progress)
    except TooManyFailuresError:
        assert stops
    else:
        assert not stops


@pytest.mark.parametrize("text", ["", "many", "-1", "5.5", "%", "101%", "-1%", "nan%"])
def test_failure_limits_are_checked(text: str) -> None:
    with pytest.raises(
        ConfigError, match=f"--max-failures '{text}': expected a number of images, or a share like"
    ):
        FailureLimit.parse(text)


def test_a_full_disk_stops_with_one_message_and_the_run_continues_when_there_is_space(
    brightness: None, full_disk: Path, tmp_path: Path
) -> None:
    write_corpus(tmp_path / "corpus", 40)
    ballast = full_disk / "ballast"
    job = {"shard": {"images": 10}}
    os.makedirs(full_disk / "run")  # noqa: PTH103
    with pytest.raises(
        StorageError, match=f"^no space left for {full_disk}/run/labels/.*run the same command again$"
    ):
        ballast.write_bytes(b"x" * (1_048_576 - 65_536))
        run(tmp_path / "corpus", full_disk / "run", **job)
    assert not list((full_disk / "run").rglob("*.tmp"))
    assert len(all_rows(full_disk / "run")) < 40
    ballast.unlink()
    run(tmp_path / "corpus", full_disk / "run", **job)
    assert len({row["image_id"] for row in all_rows(full_disk / "run")}) == 40


def test_storage_that_refuses_a_shard_stops_the_run_which_then_continues(brightness: None, tmp_path: Path) -> None:
    """Throttled reads are retried, an unreadable image is a failed row, and a refused write ends the command."""
    contents = write_corpus(tmp_path / "corpus", 20)
    with FaultyS3() as server:
        server.objects.update({f"bucket/images/{name}": data for name, data in contents.items()})
        storage, first = Storage(server.options), "bucket/images/part0/photo-00000.jpg"
        server.fail("GET", first, "403 AccessDenied", times=10**6)
        server.fail("GET", "bucket/images/part1", "503 SlowDown", times=3)
        server.fail("GET", "bucket/images/part2", "truncate", times=2)
        server.fail("PUT", "labels/", "403 AccessDenied", times=10**6)
        with pytest.raises(StorageError, match=r"^cannot access s3://bucket/run/labels/.*credentials.*\)$"):
            run("s3://bucket/images", "s3://bucket/run", storage=storage, shard={"images": 10})
        assert not [name for name in server.objects if "labels/" in name]
        server.forgive("PUT")
        run("s3://bucket/images", "s3://bucket/run", storage=storage, shard={"images": 10})
        rows = [row for table in read_tables(read_run("s3://bucket/run", storage)) for row in table.to_pylist()]
    assert [row["image_id"] for row in rows] == sorted(contents)
    [bad] = [row for row in rows if row["status"] != "ok"]
    assert (f"bucket/images/{bad['image_id']}", bad["stage"], bad["error_type"]) == (first, "load", "unreadable")


def test_pools_that_cannot_be_scheduled_are_refused_on_resume_too(brightness: None, tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", 20)
    with pytest.raises(TooManyFailuresError):
        write_corpus(tmp_path / "corpus", 20, broken_each=2)
        run(tmp_path / "corpus", tmp_path / "run", "0", shard={"images": 5})
    with pytest.raises(ResourceError, match="9 actors with 0.5 CPU each"):
        run(tmp_path / "corpus", tmp_path / "run", wait=0, shard={"images": 5}, resources={"actors": 9})


class Patient(Brightness):
    """0.3 s per image; every image is noted in a file."""

    log = Path()

    def __init__(self, config: JobConfig, classes: Any, log: Path) -> None:
        super().__init__(config, classes)
        self.log = log

    def segment(self, images: Sequence[np.ndarray], image_ids: Sequence[str]) -> list[Segmentation]:
        time.sleep(0.3 * len(images))
        with self.log.open("a") as log:
            log.writelines(f"{image_id}\n" for image_id in image_ids)
        return super().segment(images, image_ids)


def kept_rows(output: Path) -> int:
    """Rows in committed shards, and finished rows of the others."""
    found = read_status(read_run(str(output), Storage()))
    left = [Attempts.read(Storage(), str(output), started.shard) for started in found.started]
    return found.images_done + sum(len(attempts.done) for attempts in left if attempts is not None)


def test_ctrl_c_after_20_of_40_images_keeps_all_but_the_batches_at_hand(
    brightness: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two actors; progress shows the images of shards that are not committed, also in the run folder."""
    corpus, output, log = tmp_path / "corpus", tmp_path / "run", tmp_path / "log"
    contents = write_corpus(corpus, 40)
    patient = kind(lambda config, classes: Patient(config, classes, log))
    monkeypatch.setitem(segmenters.SEGMENTERS, "patient", patient)
    phases, told, before_commit = [], [0], []

    def stop_at_20() -> None:
        while told[0] < 20 or not list(output.glob("labels/*")):
            time.sleep(0.2)
            now = read_heartbeat(read_run(str(output), Storage())) if (output / "run.json").exists() else None
            if now is not None:
                phases.append(now.phase)
                told[0] = now.images
                before_commit.append(now.images > 8 * len(list(output.glob("labels/*"))))
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    monkeypatch.setattr("cliper.jobs.progress.EVERY", 0.5)
    thread = threading.Thread(target=stop_at_20, daemon=True)
    thread.start()
    two = {"segmenter": "patient", "resources": {"actors": 2, "cpus_per_actor": 1}}
    with pytest.raises(KeyboardInterrupt):
        run(corpus, output, **two)
    thread.join()
    assert phases[-1] == "labeling"
    assert any(before_commit)
    assert len(list(output.glob("manifest/*.parquet"))) == 1
    assert not (output / "progress.json").exists()
    kept = kept_rows(output)
    assert kept >= told[0] - 2 * 2 * 8  # each actor has a batch at hand, and a shard on its way to the store
    assert kept < 40
    done = len(log.read_text().splitlines())
    run(corpus, output, **two)
    assert sorted(row["image_id"] for row in all_rows(output)) == sorted(contents)
    assert len(log.read_text().splitlines()) - done == 40 - kept


@pytest.mark.parametrize(
    ("images", "actors", "expected"),
    [(3, None, 8), (40, 2, 8), (1000, 2, 32), (1000, 32, 8), (10_000, None, 256), (10_000, 64, 40)],
)
def test_a_small_corpus_is_cut_so_that_every_actor_has_work(
    images: int, actors: int | None, expected: int
) -> None:
    entries = [Entry(f"{i}", f"/{i}") for i in range(images)]
    config = with_overrides(load_config("tiny"), Resources(actors=actors and str(actors)))
    limits, same = fitting_shards(config, tables_of(entries))
    assert limits.images == expected
    assert [entry for table in same for entry in entries_of(table)] == entries


def test_shards_that_the_user_has_sized_and_row_groups_are_left_alone() -> None:
    sized = with_overrides(JobConfig.model_validate({"shard": {"images": 100}}), Resources(actors="9"), 4)
    assert fitting_shards(sized, tables_of([Entry("a", "/a")]))[0].images == 100
    grouped = tables_of([Entry("a", "/a.parquet", row=0, group=0)])
    assert fitting_shards(JobConfig(), grouped)[0].images == 256
