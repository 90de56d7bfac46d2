"""A labeling job: settings, weights, corpus and run folder checked before Ray or a GPU is asked for."""

import glob
import itertools
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import pyarrow as pa

from cliper.model.classes import ClassList
from cliper.pipeline.config import InputConfig, JobConfig, ResourceConfig, changed, lookup
from cliper.pipeline.corpus.left_out import LeftOut
from cliper.pipeline.corpus.manifest import Manifest, fitting_shards, read_manifest, write_listed
from cliper.pipeline.corpus.sources import Entry, detect_format, list_entries, list_tables, no_images
from cliper.pipeline.corpus.sources.tables import tables_of
from cliper.pipeline.errors import InputError, RunError
from cliper.pipeline.extras import require
from cliper.pipeline.label.segmenters import SegmenterKind, chosen
from cliper.pipeline.parallel import Crew, Workers, crew
from cliper.pipeline.run.extend import LOOK_LOCAL, LOOK_REMOTE, count_new, extend_run
from cliper.pipeline.run.folder import Run, begin_run, check_folder, identity_of, read_run
from cliper.pipeline.run.lease import hold
from cliper.pipeline.run.masks import MASK_CODECS
from cliper.pipeline.storage.backend import Storage
from cliper.pipeline.storage.uris import absolute, is_local

_MAGIC = re.compile(r"[*?\[{]")
SAY_EVERY = 5.0  # seconds between two lines while the corpus is listed


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
    wants_gpu: Callable[[ResourceConfig], bool] = lambda wanted: wanted.device == "cuda",
    extend: Collection[str] | None = None,
    workers: Callable[[], Workers] = lambda: 1,
) -> Job:
    """Validate everything, then create or continue the run folder and its manifest. Raises CliperError.

    With `extend`, an existing manifest is extended to the corpus as it is now; see run/extend.py for its values.

    With `held`, the run folder's lease is taken before the first write and kept until `held` closes. `wants_gpu`
    says whether the actors will be on GPUs; it is asked last, and only if the masks depend on it. `workers`
    returns who lists a new corpus, which does not change the result; 1 is this process.
    """
    kind, config = chosen(config)
    codec = lookup("mask_codec", config.mask_codec, MASK_CODECS)
    require("export", f"mask_codec {config.mask_codec}", *codec.needs)
    pinned = kind.pin(config)
    weights = kind.identity(pinned)
    left_out = LeftOut()
    if not output.strip():
        raise RunError("the output is empty; name a folder or prefix of its own (--output)")
    listed = _without_output(config.input, input_uri, output)
    entries = _first_listed(storage, input_uri, listed, left_out)
    dtype = settled_dtype(config, output, storage, wants_gpu)
    config, pinned = changed(config, dtype=dtype), changed(pinned, dtype=dtype)
    identity = identity_of(config, classes, input_uri, weights)
    check_folder(output, storage, identity)
    if held is not None:
        held.enter_context(hold(output, storage))
    run = begin_run(output, storage, identity)
    manifest = read_manifest(storage, output)
    if manifest is None:
        by_crew = partial(list_tables, storage, input_uri, listed)
        manifest = _list_new(run, entries, config, left_out, by_crew, workers())
    elif extend is not None:
        manifest = _extend(run, manifest, entries, config, left_out, extend)
    return Job(run, manifest, pinned, classes, kind.verified(weights), kind.describe(config))


def settled_dtype(
    config: JobConfig, output: str, storage: Storage, wants_gpu: Callable[[ResourceConfig], bool]
) -> str:
    """`dtype`, with auto replaced by what it stands for, so that the run's identity names it.

    A run whose identity says auto (of version 0.1) or that is finished keeps what it has: nothing will be computed
    that could differ.
    """
    if config.dtype != "auto":
        return config.dtype
    return _stored_dtype(output, storage) or ("float16" if wants_gpu(config.resources) else "float32")


def _stored_dtype(output: str, storage: Storage) -> str | None:
    try:
        run = read_run(output, storage)
        dtype: str = run.identity["model"].get("dtype") or run.identity["dtype"]
    except (RunError, KeyError, TypeError, AttributeError):
        return None
    manifest = read_manifest(storage, output)
    finished = manifest is not None and not run.pending_shards(manifest)
    return dtype if dtype == "auto" or finished else None


def _without_output(config: InputConfig, input_uri: str, output: str) -> InputConfig:
    """The settings of a listing that skips the run's own folder, if it is inside the input.

    Else a later listing would take pictures of it, of `--keep-heatmaps` for example, for images of the corpus.
    """
    top, run = absolute(input_uri).rstrip("/"), absolute(output).rstrip("/")
    if magic := _MAGIC.search(top):  # ids are relative to the folder before the first wildcard
        top = top[: magic.start()].rpartition("/")[0]
    if not run.startswith(f"{top}/"):
        return config
    inside = glob.escape(run[len(top) + 1 :])
    return config.model_copy(update={"exclude": (*config.exclude, f"{inside}/**")})


def _first_listed(storage: Storage, uri: str, config: InputConfig, left_out: LeftOut) -> Iterator[Entry]:
    """The corpus, listed far enough to know that it exists; nothing has been written yet."""
    entries = list_entries(storage, uri, config, left_out)
    first = next(entries, None)
    if first is None:
        raise no_images(uri, left_out)
    return itertools.chain([first], entries)


def _list_new(
    run: Run,
    entries: Iterator[Entry],
    config: JobConfig,
    left_out: LeftOut,
    by_crew: Callable[[LeftOut, Crew], Iterator[pa.Table]],
    workers: Workers,
) -> Manifest:
    """List the corpus of a run that has labeled nothing yet, by this process (`entries`, `left_out`) or by a crew.

    Raises RunError for one that holds labels: a new list may cut the corpus otherwise, and would lose and double
    images.
    """
    if run.done_shards():
        raise RunError(
            f"{run.uri} holds labels, but its list of images (manifest/index.json) is gone; restore it, "
            "or label into another folder (--new-run)"
        )
    with crew(workers) as team:
        if workers == 1:
            return _list_corpus(run, tables_of(entries), config, left_out, team)
        left_out = LeftOut()
        return _list_corpus(run, by_crew(left_out, team), config, left_out, team)


def _list_corpus(
    run: Run, tables: Iterator[pa.Table], config: JobConfig, left_out: LeftOut, team: Crew
) -> Manifest:
    """Write the manifest, and print what the listing left out."""
    try:
        limits, tables = fitting_shards(config, tables)
        manifest = write_listed(tables, run.storage, run.uri, limits, team, _counting(), left_out)
    except BaseException:
        run.discard()  # an unlisted run holds nothing worth keeping, and would claim the folder
        raise
    _print(left_out.lines())
    return manifest


def _extend(
    run: Run,
    manifest: Manifest,
    entries: Iterator[Entry],
    config: JobConfig,
    left_out: LeftOut,
    relabel: Collection[str],
) -> Manifest:
    """Extend the manifest, and print what was found."""
    extended, extension = extend_run(run, manifest, entries, config, left_out, relabel, _counting())
    _print([*left_out.lines(), *extension.lines()])
    return extended


def notice_of_new(job: Job, input_uri: str) -> str | None:
    """A line on images that are in the input and not in the run; None if there are none.

    Only for forms that are listed without reading files, and corpora up to LOOK_LOCAL images (LOOK_REMOTE if they
    are not local), which takes three seconds (ten requests).
    """
    config, most = job.config.input, LOOK_LOCAL if is_local(input_uri) else LOOK_REMOTE
    try:
        form = detect_format(absolute(input_uri)) if config.format == "auto" else config.format
        if form not in ("images", "list") or job.manifest.images > most or input_uri.startswith("http"):
            return None
        listed = list_entries(job.run.storage, input_uri, _without_output(config, input_uri, job.run.uri))
        found = count_new(job.run, job.manifest, listed)
    except InputError as error:
        return f"notice    the input cannot be listed again: {error}"
    if not found.new:
        return None
    return f"notice    {found.new:,} new images in the input, for example {found.first_new}; --extend labels them"


def _counting() -> Callable[[int], None]:
    """Prints the number of listed images every few seconds."""
    said = time.monotonic()

    def report(count: int) -> None:
        nonlocal said
        if time.monotonic() - said >= SAY_EVERY:
            said = time.monotonic()
            print(f"listed {count} images", file=sys.stderr, flush=True)

    return report


def _print(lines: Sequence[str]) -> None:
    for line in lines:
        print(line, file=sys.stderr, flush=True)
