"""A labeling job: settings, weights, corpus and run folder checked before Ray or a GPU is asked for."""

import itertools
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from cliper.model.classes import ClassList
from cliper.model.errors import CliperError
from cliper.pipeline.config import JobConfig, pick
from cliper.pipeline.corpus.manifest import Manifest, read_manifest, write_manifest
from cliper.pipeline.corpus.sources import Entry, list_entries
from cliper.pipeline.errors import InputError
from cliper.pipeline.label.segmenters import SEGMENTERS, SegmenterKind
from cliper.pipeline.run.folder import Run, check_folder, identity_of, open_run
from cliper.pipeline.run.lease import hold
from cliper.pipeline.run.masks import MASK_CODECS
from cliper.pipeline.storage.backend import Storage


@dataclass(frozen=True)
class Job:
    """A labeling job that has been checked as far as possible without Ray or a GPU.

    `config` and `kind` are for the actors: hub revisions are commits, other weights than the run's are refused.
    """

    run: Run
    manifest: Manifest
    config: JobConfig
    classes: ClassList
    kind: SegmenterKind
    model: str


def open_job(
    input_uri: str,
    output: str,
    config: JobConfig,
    classes: ClassList,
    storage: Storage,
    held: ExitStack | None = None,
) -> Job:
    """Validate everything, then create or continue the run folder and its manifest. Raises CliperError.

    With `held`, the run folder's lease is taken before the first write and kept until `held` closes.
    """
    kind = pick("segmenter", config.segmenter, SEGMENTERS)
    pick("mask_codec", config.mask_codec, MASK_CODECS)
    pinned = kind.pin(config)
    weights = kind.identity(pinned)
    entries = _first_listed(storage, input_uri, config)
    identity = identity_of(config, classes, input_uri, weights)
    check_folder(output, storage, identity)
    if held is not None:
        held.enter_context(hold(output, storage))
    run = open_run(output, storage, identity)
    manifest = read_manifest(storage, output) or _list_corpus(run, entries, config)
    return Job(run, manifest, pinned, classes, kind.verified(weights), kind.describe(config))


def _first_listed(storage: Storage, uri: str, config: JobConfig) -> Iterator[Entry]:
    """The corpus, listed far enough to know that it exists; nothing has been written yet."""
    entries = list_entries(storage, uri, config.input)
    first = next(entries, None)
    if first is None:
        raise InputError(f"no images found in {uri}; check the path, or its format (input.format in the config)")
    return itertools.chain([first], entries)


def _list_corpus(run: Run, entries: Iterator[Entry], config: JobConfig) -> Manifest:
    reported = 0

    def report(count: int) -> None:
        nonlocal reported
        if count - reported >= 100_000:
            reported = count
            print(f"listed {count} images", file=sys.stderr, flush=True)

    try:
        return write_manifest(entries, run.storage, run.uri, config.shard, report)
    except CliperError:
        run.discard()  # an unlisted run holds nothing worth keeping, and would claim the folder
        raise
