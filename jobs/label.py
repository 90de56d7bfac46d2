"""`cliper label`: label images and write masks and metadata to Parquet."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Annotated

import typer

from cliper.jobs.common import execute
from cliper.jobs.options import InputOptions, Resources, Verbose, with_input, with_overrides, with_preset
from cliper.jobs.progress import FailureLimit
from cliper.jobs.session import clean_stop, ray_session
from cliper.jobs.storage_options import StorageOption, parse_options
from cliper.jobs.workers import listers
from cliper.model.errors import ConfigError
from cliper.pipeline.config import classes_for, describe_classes, load_config
from cliper.pipeline.label.job import notice_of_new, open_job
from cliper.pipeline.label.segmenters import chosen
from cliper.pipeline.run.extend import RELABEL
from cliper.pipeline.run.folder import free_folder
from cliper.pipeline.storage.backend import Storage

Opt = typer.Option


def label(
    *,
    input: Annotated[
        str, Opt(help="Folder, glob, s3:// prefix, list (.parquet .csv .jsonl .txt) or .tar", metavar="URI")
    ],
    output: Annotated[str, Opt(help="Run folder: local path or s3:// prefix", metavar="URI")],
    classes: Annotated[
        str | None,
        Opt(help="Class file, one class per line, or a shipped list; required with real weights", metavar="FILE"),
    ] = None,
    config: Annotated[str, Opt(help="YAML file or a shipped config", metavar="FILE")] = "tiny",
    preset: Annotated[
        str,
        Opt(
            help="exact, fast (bfloat16, one map for all layers), fast-384, fast-256 (small FGC), clip-only",
            metavar="NAME",
        ),
    ] = "exact",
    resources: Resources = Resources(),
    batch_size: Annotated[int | None, Opt(min=1, help="Images per GPU batch; part of the run's identity")] = None,
    storage_option: StorageOption = None,
    keep_heatmaps: Annotated[
        int | None,
        Opt(min=0, help="Write heat maps of the first N images (of the first shard at most)", metavar="N"),
    ] = None,
    max_failures: Annotated[
        str | None,
        Opt(
            help="Stop with exit code 1 when more images fail than N or P%; default: all of 100",
            metavar="N|P%",
        ),
    ] = None,
    reading: InputOptions = InputOptions(),
    extend: Annotated[
        bool,
        Opt("--extend", help="List INPUT again: add new images to the run, report what vanished or changed"),
    ] = False,
    relabel: Annotated[
        list[str] | None,
        Opt(
            help="With --extend, also label these again: changed (another size, ETag, tar header or URI), touched "
            "(the same size, another modification time); repeat for both",
            metavar="KIND",
        ),
    ] = None,
    new_run: Annotated[
        bool,
        Opt("--new-run", help="If OUTPUT holds a run, write to the first free OUTPUT-2, OUTPUT-3, ... instead"),
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Label every image below INPUT and write masks and metadata to OUTPUT.

    Run the same command again to continue an interrupted run: finished shards are not computed again. One command
    at a time works on a run; a second one is refused. Ctrl-C and SIGTERM stop cleanly.

    A run keeps the list of images of its first command. --extend adds the images that are new since then.
    """
    kinds = relabel_kinds(relabel or [], extend)
    settings = with_overrides(with_preset(load_config(config), preset), resources, batch_size, keep_heatmaps)
    _, settings = chosen(with_input(settings, reading))
    class_list = classes_for(classes, settings)
    limit = FailureLimit() if max_failures is None else FailureLimit.parse(max_failures)
    storage = Storage(parse_options(storage_option or []))
    if new_run:
        output = free_folder(output, storage)
    with clean_stop(output), ray_session(verbose, resources.wait) as session, ExitStack() as held:
        print(f"classes   {describe_classes(class_list)}", flush=True)
        job = open_job(
            input, output, settings, class_list, storage, held, session.wants_gpu, kinds, partial(listers, session)
        )
        execute(job, session, limit)
        if not extend and (notice := notice_of_new(job, input)):
            print(notice, flush=True)


def relabel_kinds(relabel: Sequence[str], extend: bool) -> Sequence[str] | None:
    """The value of open_job's `extend`. Raises ConfigError for an unknown kind, or --relabel without --extend."""
    unknown = [kind for kind in relabel if kind not in RELABEL]
    if unknown:
        raise ConfigError(f"--relabel '{unknown[0]}': expected {' or '.join(RELABEL)}")
    if relabel and not extend:
        raise ConfigError("--relabel needs --extend, which lists the input again")
    return relabel if extend else None
