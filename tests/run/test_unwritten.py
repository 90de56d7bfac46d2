"""Labeled shards that wait to be written: a stop keeps their rows, and a commit leaves no file behind."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cliper.model.segmentation import Segmentation
from cliper.pipeline.label.actor import SegmentShard
from cliper.pipeline.label.job import Job
from cliper.pipeline.label.stages import Task, load_task, make_actor, write_task
from cliper.pipeline.run.attempts import Attempts
from cliper.pipeline.storage.backend import Storage
from tests.support.fakes import Brightness, write_corpus
from tests.support.jobs import fake_job, label_here
from tests.support.labeled import SHARD, rows_of

seen: list[str] = []


class Noting(Brightness):
    """Notes the images that it segments."""

    def segment(self, images: Sequence[np.ndarray], image_ids: Sequence[str]) -> list[Segmentation]:
        seen.extend(image_ids)
        return super().segment(images, image_ids)


@dataclass(frozen=True)
class Committing(Storage):
    """Commits the shard of the next kept rows just before they are written."""

    waiting: list[tuple[Job, pa.Table]] = field(default_factory=list)

    def write(self, uri: str, data: bytes) -> None:
        if self.waiting and b'"mask"' in data and "attempts/" in uri:
            job, labeled = self.waiting.pop()
            write_task(job, labeled)
        super().write(uri, data)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """24 images in three shards, one image damaged; labeled shards are looked for at once."""
    monkeypatch.setattr("cliper.pipeline.run.attempts.KEEP_SECONDS", 0.0)
    monkeypatch.setattr("cliper.pipeline.run.attempts.KEEP_SHARE", float("inf"))
    monkeypatch.setattr(Attempts, "worth_keeping", lambda self, left: False)  # while a shard is labeled
    write_corpus(tmp_path / "corpus", 24, broken_each=1)
    seen.clear()
    return fake_job(str(tmp_path / "corpus"), str(tmp_path / "run"), Committing(), Noting, **SHARD)


def labeled(actor: SegmentShard, job: Job, shard: int) -> pa.Table:
    return actor(load_task(job, Task(shard)))


def attempts_of(job: Job, shard: int) -> Attempts:
    found = Attempts.read(job.run.storage, job.run.uri, shard)
    assert found is not None
    return found


def attempts_left(job: Job) -> list[str]:
    return sorted(path.name for path in Path(job.run.uri, "attempts").glob("*"))


def test_a_stop_keeps_shards_that_wait_for_a_slow_writer(job: Job, tmp_path: Path) -> None:
    actor = make_actor(job, cpu_threads=1, driver="stopped")
    for shard in (0, 1, 2):  # the writer takes none of them
        labeled(actor, job, shard)
    assert not Path(job.run.uri, "labels").exists()
    assert [len(attempts_of(job, shard).done) for shard in (0, 1, 2)] == [8, 8, 0], "2: no look came after it"
    last = {row["image_id"] for row in load_task(job, Task(2)).to_pylist()}
    seen.clear()
    label_here(job)
    assert set(seen) <= last
    label_here(other := fake_job(str(tmp_path / "corpus"), str(tmp_path / "other"), **SHARD))
    assert [row["mask"] for row in rows_of(job.run)] == [row["mask"] for row in rows_of(other.run)]
    assert attempts_left(job) == []


def test_committed_shards_are_left_alone(job: Job) -> None:
    actor = make_actor(job, cpu_threads=1, driver="me")
    for shard in (0, 1, 2):
        write_task(job, labeled(actor, job, shard))
        assert attempts_left(job) == []
        Path(job.run.uri, "attempts").rmdir()  # as in a bucket


def test_a_shard_that_is_committed_while_its_rows_are_kept_leaves_no_file(job: Job) -> None:
    assert isinstance(job.run.storage, Committing)
    actor = make_actor(job, cpu_threads=1, driver="me")
    job.run.storage.waiting.append((job, labeled(actor, job, 0)))
    labeled(actor, job, 1)
    assert job.run.done_shards() == {0}
    assert attempts_left(job) == ["shard-000001.json"]


def test_a_shard_that_is_labeled_again_is_not_kept(job: Job) -> None:
    label_here(job)
    actor = make_actor(job, cpu_threads=1, driver="me")
    labeled(actor, job, 0)
    actor.unwritten.look()
    assert attempts_of(job, 0).done == []
