"""`cliper label`: images in, masks and metadata in Parquet out."""

from contextlib import ExitStack
from typing import Annotated

import typer

from cliper.jobs.common import execute, parse_options, with_overrides, with_preset
from cliper.jobs.progress import FailureLimit
from cliper.jobs.session import clean_stop
from cliper.pipeline.config import load_classes, load_config
from cliper.pipeline.label.job import open_job
from cliper.pipeline.run.folder import free_folder
from cliper.pipeline.storage.backend import Storage

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
    keep_heatmaps: Annotated[
        int | None,
        Opt(min=0, help="Write heat maps of the first N images (of the first shard at most)", metavar="N"),
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
    if keep_heatmaps is not None:
        resources = settings.resources.model_copy(update={"keep_heatmaps": keep_heatmaps})
        settings = settings.model_copy(update={"resources": resources})
    limit = None if max_failures is None else FailureLimit.parse(max_failures)
    storage = Storage(parse_options(storage_option or []))
    if new_run:
        output = free_folder(output, storage)
    with clean_stop(output), ExitStack() as held:
        job = open_job(input, output, settings, load_classes(classes), storage, held)
        execute(job, verbose, limit)
