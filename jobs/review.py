"""`cliper review`: export the masks that most need review, and import the corrections."""

import json
import sys
from typing import Annotated

import typer

from cliper.jobs.storage_options import StorageOption, parse_options
from cliper.jobs.workers import WorkersOption, started
from cliper.pipeline.errors import ReviewError
from cliper.pipeline.run.corrections import versions
from cliper.pipeline.run.folder import Run, class_names, read_run
from cliper.pipeline.run.rows import RowFilter
from cliper.pipeline.storage.backend import Storage
from cliper.pipeline.storage.uris import join

review = typer.Typer(
    name="review",
    help="Export the masks that most need review to Label Studio, and import the corrections.",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Opt = typer.Option
RunFolder = Annotated[str, typer.Argument(help="Run folder: local path or s3:// prefix", metavar="RUN")]


@review.command()
def pick(
    run: RunFolder,
    output: Annotated[str, Opt(help="New folder for tasks.json and config.xml", metavar="URI")],
    count: Annotated[int, Opt(min=1, help="How many images")] = 100,
    against: Annotated[
        str | None, Opt(help="Second run of the same corpus, e.g. without FGC: disagreement counts", metavar="RUN")
    ] = None,
    agreement: Annotated[
        str | None, Opt(help="Folder that 'cliper agree' wrote: disagreement counts", metavar="FOLDER")
    ] = None,
    class_name: Annotated[
        list[str] | None, Opt("--class", help="Only images with this class; repeat for more", metavar="NAME")
    ] = None,
    where: Annotated[str | None, Opt(help="Only rows that meet this SQL condition", metavar="SQL")] = None,
    again: Annotated[bool, Opt("--again", help="Also pick images that were reviewed before")] = False,
    workers: WorkersOption = None,
    storage_option: StorageOption = None,
) -> None:
    """Write the images that most need review as Label Studio tasks, the most urgent first.

    The score is the mean of doubt (a small margin over the second-best class, compared with the other images),
    rarity (of the rarest class in the mask) and, with --against or --agreement, disagreement (1 - mean IoU).
    Import tasks.json into a Label Studio project whose labeling interface is config.xml.
    """
    from cliper.pipeline.evaluate.agree import image_agreement
    from cliper.pipeline.export.formats.label_studio import labeling_config
    from cliper.pipeline.review import select as reviews

    storage = Storage(parse_options(storage_option or []))
    opened = read_run(run, storage)
    if storage.exists(join(output, "tasks.json")):
        raise ReviewError(f"{join(output, 'tasks.json')} exists already; choose another output")
    if storage.exists(join(output, "run.json")):
        raise ReviewError(f"{output} is a run folder; choose a folder of its own for the tasks (--output)")
    keep = RowFilter(classes=tuple(class_name or ()), where=where)
    other = None if against is None else read_run(against, storage)
    known = None if agreement is None else image_agreement(opened, agreement)
    with started(workers) as readers:
        picks = reviews.select_images(opened, count, keep, other, again, known, readers)
    if not picks:
        raise ReviewError(f"{run} has no image left to review; --again picks reviewed ones too")
    storage.write(join(output, "config.xml"), labeling_config(class_names(opened.identity)).encode())
    tasks = json.dumps(reviews.review_tasks(opened, picks), ensure_ascii=False)
    storage.write(join(output, "tasks.json"), tasks.encode())
    print(f"picked    {len(picks)} images, scores {picks[0].score:.2f} to {picks[-1].score:.2f}")
    print(f"tasks     {join(output, 'tasks.json')}")
    print(f"interface {join(output, 'config.xml')}")


@review.command()
def apply(
    run: RunFolder,
    export: Annotated[str, typer.Argument(help="The project's export, format JSON", metavar="EXPORT")],
    storage_option: StorageOption = None,
) -> None:
    """Store the corrections of a Label Studio export as a new version in RUN.

    The run's own masks are not changed. Exports and training use the masks of the latest version instead of them.
    """
    from cliper.pipeline.review.apply import apply_review

    storage = Storage(parse_options(storage_option or []))
    opened = read_run(run, storage)
    done = apply_review(opened, _read(storage, export), export)
    if done.skipped:
        print(f"{done.skipped} tasks without an annotation were skipped", file=sys.stderr)
    print(f"reviewed  {done.changed + done.confirmed} images: {done.changed} changed, {done.confirmed} confirmed")
    print(f"version   {_version(opened, done.version, done.stored)}")


def _read(storage: Storage, uri: str) -> bytes:
    try:
        return storage.read(uri)
    except FileNotFoundError as error:
        raise ReviewError(f"{uri} does not exist") from error


def _version(run: Run, version: int | None, stored: bool) -> str:
    if version is None:
        return "none: the file holds no annotation"
    there = f"{join(run.uri, 'corrections', f'v{version:04d}')}, {len(versions(run))} in all"
    return there if stored else f"{there}; it held these corrections already"
