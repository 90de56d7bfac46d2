"""Real runs without Ray: the stages of pipeline/flow.py one after another, in this process."""

from collections.abc import Sequence

from cliper_model.classes import ClassList
from jobs.label import open_job
from pipeline.config import JobConfig
from pipeline.load import load_entries
from pipeline.run import Run
from pipeline.schema import label_schema
from pipeline.segment import SegmenterFactory, SegmentShard
from pipeline.sink import write_shard
from pipeline.storage import Storage


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
