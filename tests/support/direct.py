"""Real runs without Ray: the stages of pipeline/flow.py one after another, in this process."""

from collections.abc import Sequence

from cliper.model.classes import ClassList
from cliper.pipeline.config import JobConfig
from cliper.pipeline.corpus.load import load_entries
from cliper.pipeline.label.actor import SegmentShard
from cliper.pipeline.label.job import open_job
from cliper.pipeline.label.segmenters import SegmenterFactory
from cliper.pipeline.run.folder import Run
from cliper.pipeline.run.schema import label_schema
from cliper.pipeline.run.shards import write_shard
from cliper.pipeline.storage.backend import Storage


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
    run = job.run
    actor = SegmentShard(make or job.kind.make, config, classes, run, cpu_threads=1, driver="me")
    schema = label_schema(classes.names, run.fingerprint, config.mask_codec, job.model)
    for shard in range(job.manifest.shards) if shards is None else shards:
        entries = job.manifest.read_shard(run.storage, run.uri, shard)
        labeled = actor(load_entries(run.storage, shard, entries, config.input.image_column))
        write_shard(labeled, run.storage, run.uri, schema)
    return run
