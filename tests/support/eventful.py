"""A run in which everything has happened that leaves files: extended, interrupted, corrected, compared."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa

from cliper.pipeline.corpus.left_out import LeftOut
from cliper.pipeline.corpus.sources import list_entries
from cliper.pipeline.label.job import Job
from cliper.pipeline.label.stages import Task, load_task, make_actor
from cliper.pipeline.report.agreements import add_summary
from cliper.pipeline.run.attempts import Attempts
from cliper.pipeline.run.corrections import corrected_row, write_corrections
from cliper.pipeline.run.extend import RELABEL, extend_run
from cliper.pipeline.run.folder import Run
from cliper.pipeline.run.heartbeat import Heartbeat, write_heartbeat
from cliper.pipeline.run.lease import LEASE_FILE, Holder
from cliper.pipeline.storage.uris import join
from tests.support.fakes import jpeg, write_corpus
from tests.support.jobs import fake_job, label_here
from tests.support.labeled import SHARD, rows_of

REVIEWED = datetime(2026, 1, 1, tzinfo=UTC)


def eventful_run(folder: Path, images: int = 20) -> Run:
    """Write `folder`/corpus and `folder`/run.

    Its list has a second part and a revised first one; a changed image waits to be labeled again; one new shard
    has the kept rows of an interrupted attempt, and no label file.
    """
    write_corpus(folder / "corpus", images, broken_each=1)
    job = fake_job(str(folder / "corpus"), str(folder / "run"), **SHARD)
    label_here(job)
    _correct(job.run)
    for i in range(12):
        (folder / "corpus" / f"zz-new-{i:02d}.jpg").write_bytes(jpeg(500 + i))
    (folder / "corpus" / rows_of(job.run)[-1]["image_id"]).write_bytes(jpeg(600) + bytes(100))
    extended = extended_job(folder)
    first, second = extended.run.pending_shards(extended.manifest)
    label_here(extended, [Task(first)])
    _interrupt(extended, second)
    add_summary(
        extended.run, "abc", {"runs": ["runs/b"], "images": images, "iou": 0.5, "classes": [], "least": []}
    )
    _be_at_work(extended.run)
    return extended.run


def extended_job(folder: Path) -> Job:
    """The job of `cliper label --extend --relabel changed --relabel touched` over such a run."""
    job = fake_job(str(folder / "corpus"), str(folder / "run"), **SHARD)
    listed = list_entries(job.run.storage, str(folder / "corpus"), job.config.input)
    manifest, _ = extend_run(job.run, job.manifest, listed, job.config, LeftOut(), RELABEL)
    return Job(job.run, manifest, job.config, job.classes, job.kind, job.model)


def _correct(run: Run) -> None:
    row = next(row for row in rows_of(run) if row["status"] == "ok")
    labels = np.ones((row["height"], row["width"]), np.uint8)
    by = {"shard": 0, "corrected_by": "me", "corrected_at": REVIEWED, "source": "x.json", "changed": True}
    write_corrections(run, [corrected_row(run, row, labels) | by])


def _interrupt(job: Job, shard: int) -> None:
    """Leave the attempts file of a stopped driver, with half of the shard's rows."""
    labeled: pa.Table = make_actor(job, 1, "me")(load_task(job, Task(shard)))
    attempts = Attempts.begin(job.run.storage, job.run.uri, shard, "stopped")
    attempts.keep(labeled.drop_columns(["shard"]).to_pylist()[: len(labeled) // 2])


def _be_at_work(run: Run) -> None:
    """The lease and heartbeat of a command, held by this process."""
    run.storage.write(join(run.uri, LEASE_FILE), Holder.me(60.0).encode())
    write_heartbeat(run, Heartbeat("labeling", 24, 32, 3.5, 5, 10.0, 1))
