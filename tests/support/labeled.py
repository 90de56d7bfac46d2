"""Small labeled runs without Ray: the same stages as the flow, called one after the other."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from cliper.pipeline.config import JobConfig
from cliper.pipeline.corpus.manifest import Manifest
from cliper.pipeline.label.segmenters import SegmenterFactory
from cliper.pipeline.label.stages import Task
from cliper.pipeline.run.folder import Run
from cliper.pipeline.storage.backend import Storage
from tests.support.fakes import Brightness
from tests.support.jobs import fake_job, label_here, tasks_of

SHARD = {"shard": {"images": 8}}


def open_small(corpus: str, output: str, storage: Storage, **settings: Any) -> tuple[Run, Manifest, JobConfig]:
    """A run over `corpus`, its manifest written, nothing labeled yet."""
    job = fake_job(corpus, output, storage, **(SHARD | settings))
    return job.run, job.manifest, job.config


def label_small(
    corpus: str | Path,
    output: str | Path,
    storage: Storage | None = None,
    factory: SegmenterFactory = Brightness,
    shards: Sequence[int] | None = None,
    **settings: Any,
) -> Run:
    """Label a corpus (only `shards` if given) and return the run."""
    job = fake_job(str(corpus), str(output), storage, factory, **(SHARD | settings))
    label_here(job, tasks_of(job) if shards is None else [Task(shard) for shard in shards])
    return job.run


def rows_of(run: Run) -> list[dict[str, Any]]:
    """All rows of a run, in the order of shards."""
    from cliper.pipeline.run.rows import read_tables

    return pa.concat_tables(read_tables(run)).to_pylist()
