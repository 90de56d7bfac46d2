"""`cliper report`: write a self-contained HTML page on a run."""

import time
from pathlib import Path
from typing import Annotated

import typer

from cliper.jobs.storage_options import StorageOption, parse_options
from cliper.jobs.workers import WorkersOption, started
from cliper.model.errors import ConfigError
from cliper.pipeline.config import counted

Opt = typer.Option

_SAMPLE = 200_000  # rows


def report(
    run: Annotated[str, typer.Argument(help="Run folder: local path or s3:// prefix", metavar="RUN")],
    output: Annotated[
        str | None, Opt(help="Default: RUN/report/index.html; with --against, against-NAME.html", metavar="FILE")
    ] = None,
    sample: Annotated[int, Opt(min=1, help="Rows to read at most; of a larger run, shards at random")] = _SAMPLE,
    workers: WorkersOption = None,
    storage_option: StorageOption = None,
    against: Annotated[
        str | None, Opt(help="Another run over the same images: the page compares the two", metavar="RUN")
    ] = None,
) -> None:
    """Write a self-contained HTML page: totals, throughput, failures, classes, confidence and images with masks.

    Works on unfinished runs. The page loads no other files and can be sent as one file. With --against, it shows
    two runs side by side: settings, classes, and the images whose masks differ most.
    """
    from cliper.pipeline.report.against import write_against
    from cliper.pipeline.report.run_page import write_run_report
    from cliper.pipeline.run.folder import read_run
    from cliper.pipeline.storage.backend import Storage
    from cliper.pipeline.storage.uris import join

    start, storage = time.monotonic(), Storage(parse_options(storage_option or []))
    if output is not None and Path(output).is_dir():
        raise ConfigError(f"--output {output} is a folder; name a file, e.g. {join(output, 'index.html')}")
    opened = read_run(run, storage)
    if against is not None:
        name = against.rstrip("/").rpartition("/")[2]
        target = output or join(run, "report", f"against-{name}.html")
        joined = write_against(opened, read_run(against, storage), target, sample)
        print(f"report    {target}")
        print(f"compared  {len(joined.moved)} images, {time.monotonic() - start:.1f} s")
        return
    target = output or join(run, "report", "index.html")
    with started(workers) as readers:
        done = write_run_report(opened, target, sample, readers)
    print(f"report    {target}")
    read = f"{counted(done.stats.rows, 'row')} in {counted(len(done.read), 'shard')}"
    print(f"read      {read}, {time.monotonic() - start:.1f} s")
