"""`cliper verify`: read a run back and prove that it is complete and undamaged."""

import sys
from contextlib import nullcontext, redirect_stdout
from enum import StrEnum
from typing import Annotated

import typer

from cliper.jobs.storage_options import StorageOption, parse_options
from cliper.jobs.workers import WorkersOption, started
from cliper.pipeline.config import counted
from cliper.pipeline.run.folder import Run, read_run
from cliper.pipeline.run.lease import hold
from cliper.pipeline.run.leftovers import clean_run
from cliper.pipeline.run.reader import set_aside
from cliper.pipeline.run.source import check_source
from cliper.pipeline.run.verify import KINDS, Report, verify_run
from cliper.pipeline.storage.backend import Storage

PRINTED = 20  # problems shown; --json has all

Opt = typer.Option


class Source(StrEnum):
    """How many images `--source` compares."""

    SAMPLE = "sample"
    ALL = "all"


def verify(
    run: Annotated[str, typer.Argument(help="Run folder: local path or s3:// prefix", metavar="RUN")],
    clean: Annotated[
        bool,
        Opt("--clean", help="First remove leftovers of interrupted writes (temporary files, uploads, attempts)"),
    ] = False,
    repair: Annotated[
        bool,
        Opt("--repair", help="Set damaged and foreign label files aside, for `cliper label` to write them again"),
    ] = False,
    source: Annotated[
        Source | None,
        Opt(
            help="Also read images from the source again and compare: a sample of 1,000, or all",
            metavar="sample|all",
        ),
    ] = None,
    json_output: Annotated[bool, Opt("--json", help="Print JSON; other lines go to stderr")] = False,
    workers: WorkersOption = None,
    storage_option: StorageOption = None,
) -> None:
    """Check that every image of RUN is in exactly one row, and that every row is as it was written.

    Exit code 0: the run is whole. 1: it is not, or not finished; what is wrong is listed. --clean and
    --repair change something, and only files whose names are cliper's own.
    """
    opened = read_run(run, Storage(parse_options(storage_option or [])))
    with redirect_stdout(sys.stderr) if json_output else nullcontext():
        if clean:
            remove_leftovers(opened)
        with started(workers) as readers:
            report = verify_run(opened, readers)
        print_report(report)
        offer_repair(opened, report, repair)
        same = source is None or _source_is_same(opened, source, report)
    if json_output:
        print(report.to_json())
    if not (report.whole and same):
        raise typer.Exit(1)


def remove_leftovers(run: Run) -> None:
    """Remove leftovers of interrupted writes, and print them."""
    with hold(run.uri, run.storage):  # a temporary file of a running driver is not an orphan
        for orphan in clean_run(run):
            print(f"removed {orphan.file}: {orphan.reason}")


def offer_repair(run: Run, report: Report, repair: bool) -> None:
    """Set broken label files aside if `repair`, and print the next command; nothing if no file is broken."""
    broken = report.broken_shards
    if broken and repair:
        with hold(run.uri, run.storage):
            for old, new in set_aside(run, broken):
                print(f"moved     {old} to {new}")
        print("repair    run the 'cliper label' command of this run again: it labels what was moved")
    elif broken:
        print(f"repair    'cliper verify --repair {run.uri}' sets them aside, 'cliper label' writes them")


def _source_is_same(run: Run, source: Source, report: Report) -> bool:
    """Compare with the source; print the findings and add them to the report."""
    found = check_source(run, sample=source is Source.SAMPLE)
    report.source = {"checked": found.checked, "touched": found.touched, **found.counts}
    print("\n".join(found.lines()))
    return found.same


def print_report(report: Report) -> None:
    """Print the counts, the first problems and the verdict."""
    print(f"images    {report.images} in {counted(report.shards, 'shard')}")
    print(f"rows      {report.rows}, of which {report.failed} failed, with their reason")
    for kind, meaning in KINDS.items():
        if report.counts[kind]:
            print(f"{kind:<16}{report.counts[kind]:>8}  {meaning}")
    for problem in report.problems[:PRINTED]:
        print(f"  {problem.kind}: {problem.file}: {problem.detail}")
    if len(report.problems) > PRINTED:
        print("  ... more with --json")
    for note in report.notes:
        print(f"note      {note}")
    print("whole     " + ("yes" if report.whole else "no"))
