"""`cliper label`: images in, masks and metadata in Parquet out."""

import itertools
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any

import typer
import yaml

from cliper_model.classes import ClassList
from cliper_model.errors import CliperError, ConfigError
from cliper_model.presets import preset as apply_preset
from jobs.progress import FailureLimit, RunProgress
from jobs.session import clean_stop, ray_session
from pipeline.config import JobConfig, load_classes, load_config, validate
from pipeline.errors import InputError
from pipeline.lease import hold
from pipeline.manifest import Manifest, read_manifest, write_manifest
from pipeline.masks import MASK_CODECS
from pipeline.run import Run, check_folder, free_folder, identity_of, open_run
from pipeline.segment import SEGMENTERS, SegmenterKind
from pipeline.sources import Entry, list_entries
from pipeline.storage import Storage

Opt = typer.Option


def label(
    input: Annotated[
        str, Opt(help="Folder, glob, s3:// prefix, list (.parquet .csv .txt) or .tar", metavar="URI")
    ],
    output: Annotated[str, Opt(help="Run folder: local path or s3:// prefix", metavar="URI")],
    classes: Annotated[str, Opt(help="Class file, one per line, or a shipped list", metavar="FILE")] = "tiny",
    config: Annotated[str, Opt(help="YAML file or a shipped config", metavar="FILE")] = "tiny",
    preset: Annotated[
        str, Opt(help="exact, fast (bfloat16, one attention map for all layers) or clip-only")
    ] = "exact",
    actors: Annotated[int | None, Opt(min=1, help="Segmenting actors; default: one per GPU")] = None,
    cpus_per_actor: Annotated[float | None, Opt(min=0.1, help="CPUs reserved for each actor")] = None,
    batch_size: Annotated[int | None, Opt(min=1, help="Images per GPU batch; part of the run's identity")] = None,
    storage_option: Annotated[
        list[str] | None, Opt(help="fsspec option KEY=VALUE, e.g. anon=true; repeat for more", metavar="KEY=VALUE")
    ] = None,
    max_failures: Annotated[
        str | None,
        Opt(help="Stop with exit code 1 when more images fail: a number, or a share like 5%", metavar="N|P%"),
    ] = None,
    new_run: Annotated[
        bool,
        Opt("--new-run", help="If OUTPUT holds a run, leave it and use the first free OUTPUT-2, OUTPUT-3, ..."),
    ] = False,
    verbose: Annotated[bool, Opt("--verbose", help="Show Ray's own messages")] = False,
) -> None:
    """Label every image below INPUT and write masks and metadata to OUTPUT.

    Run the same command again to continue an interrupted run: finished shards are not computed again. One command
    at a time works on a run; a second one is refused. Ctrl-C and SIGTERM stop cleanly.
    """
    settings = with_overrides(with_preset(load_config(config), preset), actors, cpus_per_actor, batch_size)
    limit = None if max_failures is None else FailureLimit.parse(max_failures)
    storage = Storage(parse_options(storage_option or []))
    if new_run:
        output = free_folder(output, storage)
    with clean_stop(output), ExitStack() as held:
        job = open_job(input, output, settings, load_classes(classes), storage, held)
        execute(job, verbose, limit)


@dataclass(frozen=True)
class Job:
    """A labeling job that has been checked as far as possible without Ray or a GPU."""

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
    weights = kind.identity(config)
    entries = _first_listed(storage, input_uri, config)
    identity = identity_of(config, classes, input_uri, weights)
    check_folder(output, storage, identity)
    if held is not None:
        held.enter_context(hold(output, storage))
    run = open_run(output, storage, identity)
    manifest = read_manifest(storage, output) or _list_corpus(run, entries, config)
    return Job(run, manifest, config, classes, kind, kind.describe(config))


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


def execute(job: Job, verbose: bool, limit: FailureLimit | None = None) -> None:
    """Label what is left of a job on Ray, and print the summary. Raises TooManyFailuresError."""
    shards = job.run.pending_shards(job.manifest)
    done = job.manifest.images_in(set(range(job.manifest.shards)) - set(shards))
    if done:
        print(f"continuing: {done} of {job.manifest.images} images are done", file=sys.stderr)
    with RunProgress(job.manifest.images, done) as progress:
        if shards:
            _label_shards(job, shards, progress, verbose, limit)
    print_summary(job, progress)


def _label_shards(
    job: Job, shards: list[int], progress: RunProgress, verbose: bool, limit: FailureLimit | None
) -> None:
    from pipeline.flow import label_corpus, plan_pool

    with ray_session(verbose) as nodes:
        pool = plan_pool(job.config.resources, nodes)
        arguments = (job.run, job.manifest, shards, job.kind.make, job.config, job.classes, pool, job.model)
        for summary in label_corpus(*arguments):
            progress.add(summary)
            if limit is not None:
                limit.check(progress)


def print_summary(job: Job, progress: RunProgress) -> None:
    """What this command did, on stdout."""
    failed = sum(progress.failures.values())
    rate = progress.images / max(progress.seconds, 1e-9)
    print(f"model     {job.model}")
    print(f"labeled   {progress.images - failed} images in {progress.seconds:.1f} s ({rate:.1f} images/s)")
    causes = ", ".join(f"{cause} {count}" for cause, count in progress.failures.most_common())
    print(f"failed    {failed}" + (f" ({causes})" if failed else ""))
    print(f"run       {job.run.uri}, {job.manifest.images} images in {job.manifest.shards} shards")
    print(f"identity  {job.run.fingerprint}")


def with_overrides(
    config: JobConfig, actors: int | None, cpus_per_actor: float | None, batch_size: int | None
) -> JobConfig:
    """The config with command-line values put in."""
    content = config.model_dump()
    given = {"actors": actors, "cpus_per_actor": cpus_per_actor}
    content["resources"] |= {key: value for key, value in given.items() if value is not None}
    if batch_size is not None:
        content["model"]["batch_size"] = batch_size
    return validate(JobConfig, content, "command line")


def with_preset(config: JobConfig, name: str) -> JobConfig:
    """The config with the changes of a preset (cliper_model/presets.py). Raises ConfigError."""
    return config.model_copy(update={"model": apply_preset(config.model, name)})


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """Parse KEY=VALUE pairs; values are YAML scalars (true, 3, text). Raises ConfigError."""
    wrong = [pair for pair in pairs if "=" not in pair]
    if wrong:
        raise ConfigError("--storage-option expects KEY=VALUE, e.g. --storage-option anon=true")
    return {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in pairs)}


def pick(setting: str, name: str, known: dict[str, Any]) -> Any:
    """Return known[name]. Raises ConfigError that names the setting and what is known."""
    if name not in known:
        raise ConfigError(f"unknown {setting} '{name}'; known: {', '.join(sorted(known))}")
    return known[name]


if __name__ == "__main__":
    from jobs.cli import run

    run(lambda: typer.run(label))
