"""Jobs over a corpus with a test's segmenter; the same stages as the flow, with or without Ray."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from cliper.jobs.session import RaySession
from cliper.model.classes import ClassList
from cliper.pipeline.config import JobConfig
from cliper.pipeline.corpus.manifest import read_manifest, write_manifest
from cliper.pipeline.corpus.sources import list_entries
from cliper.pipeline.label.job import Job
from cliper.pipeline.label.segmenters import SegmenterFactory
from cliper.pipeline.label.stages import Task, load_task, make_actor, write_task
from cliper.pipeline.run.folder import begin_run, identity_of
from cliper.pipeline.storage.backend import Storage
from tests.support.fakes import CLASSES, Brightness, kind


def fake_job(
    corpus: str,
    output: str,
    storage: Storage | None = None,
    make: SegmenterFactory = Brightness,
    classes: ClassList = CLASSES,
    **settings: Any,
) -> Job:
    """A job over `corpus`, its manifest written, nothing labeled yet."""
    storage = storage or Storage()
    config = JobConfig.model_validate(settings)
    run = begin_run(output, storage, identity_of(config, classes, corpus, {}))
    manifest = read_manifest(storage, output)
    if manifest is None:
        manifest = write_manifest(list_entries(storage, corpus, config.input), storage, output, config.shard)
    return Job(run, manifest, config, classes, kind(make), "fake")


def this_ray(wait: float = 60) -> RaySession:
    """The Ray of this process; waits for resources (seconds), which an aborted test may still hold."""
    session = RaySession(verbose=False, wait=wait, held=ExitStack())
    session._connected = True
    return session


def tasks_of(job: Job, most: int | None = None) -> list[Task]:
    """Tasks for a job's pending shards, at most `most`."""
    return [Task(shard) for shard in job.run.pending_shards(job.manifest)[:most]]


def label_here(job: Job, tasks: Sequence[Task] | None = None) -> None:
    """Label tasks of a job, by default all pending ones, in this process."""
    actor = make_actor(job, cpu_threads=1, driver="me")
    for task in tasks_of(job) if tasks is None else tasks:
        write_task(job, actor(load_task(job, task)), task.again is not None)
