"""Small labeled runs without Ray: the same stages as the flow, called one after the other."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from cliper.pipeline.config import JobConfig
from cliper.pipeline.corpus.load import load_entries
from cliper.pipeline.corpus.manifest import Manifest, read_manifest, write_manifest
from cliper.pipeline.corpus.sources import list_entries
from cliper.pipeline.label.actor import SegmentShard
from cliper.pipeline.label.segmenters import SegmenterFactory
from cliper.pipeline.run.folder import Run, identity_of, open_run
from cliper.pipeline.run.schema import label_schema
from cliper.pipeline.run.shards import write_shard
from cliper.pipeline.storage.backend import Storage
from tests.support.fakes import CLASSES, Brightness

SHARD = {"shard": {"images": 8}}


def open_small(corpus: str, output: str, storage: Storage, **settings: Any) -> tuple[Run, Manifest, JobConfig]:
    """A run over `corpus`, its manifest written, nothing labeled yet."""
    config = JobConfig.model_validate(SHARD | settings)
    run = open_run(output, storage, identity_of(config, CLASSES, corpus, {}))
    manifest = read_manifest(storage, output)
    if manifest is None:
        manifest = write_manifest(list_entries(storage, corpus, config.input), storage, output, config.shard)
    return run, manifest, config


def label_small(
    corpus: str | Path,
    output: str | Path,
    storage: Storage | None = None,
    factory: SegmenterFactory = Brightness,
    shards: Sequence[int] | None = None,
    **settings: Any,
) -> Run:
    """Label a corpus (only `shards` if given) and return the run."""
    run, manifest, config = open_small(str(corpus), str(output), storage or Storage(), **settings)
    schema = label_schema(CLASSES.names, run.fingerprint, config.mask_codec, "fake")
    actor = SegmentShard(factory, config, CLASSES, run, cpu_threads=1, driver="me")
    for shard in run.pending_shards(manifest) if shards is None else shards:
        entries = manifest.read_shard(run.storage, run.uri, shard)
        loaded = load_entries(run.storage, shard, entries, config.input.image_column)
        write_shard(actor(loaded), run.storage, run.uri, schema)
    return run


def rows_of(run: Run) -> list[dict[str, Any]]:
    """All rows of a run, in the order of shards."""
    from cliper.pipeline.run.rows import read_tables

    return pa.concat_tables(read_tables(run)).to_pylist()
