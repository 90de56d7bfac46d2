"""Real runs without Ray: the stages of pipeline/flow.py one after another, in this process."""

from collections.abc import Sequence
from dataclasses import replace

from cliper.model.classes import ClassList
from cliper.pipeline.config import JobConfig
from cliper.pipeline.label.job import open_job
from cliper.pipeline.label.segmenters import SegmenterFactory
from cliper.pipeline.label.stages import Task
from cliper.pipeline.run.folder import Run
from cliper.pipeline.storage.backend import Storage
from tests.support.fakes import kind
from tests.support.jobs import label_here


def label_directly(
    corpus: str,
    output: str,
    config: JobConfig,
    classes: ClassList,
    make: SegmenterFactory | None = None,
    storage: Storage | None = None,
    shards: Sequence[int] | None = None,
) -> Run:
    """Label a corpus, or only some `shards` of it; `make` replaces the config's own segmenter."""
    job = open_job(corpus, output, config, classes, storage or Storage())
    if make is not None:
        job = replace(job, kind=kind(make))
    label_here(job, [Task(shard) for shard in (range(job.manifest.shards) if shards is None else shards)])
    return job.run
