"""`cliper export`: the masks of a run in the formats that trainers and labeling tools read."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from cliper.jobs.storage_options import StorageOption, parse_options
from cliper.jobs.workers import WorkersOption, started
from cliper.model.errors import ConfigError
from cliper.pipeline.run.folder import class_names, read_run
from cliper.pipeline.storage.backend import Storage

if TYPE_CHECKING:
    from cliper.pipeline.export.driver import Summary
    from cliper.pipeline.run.corrections import Version

INTERRUPTED = 130
FORMATS = "coco, coco-panoptic, voc, yolo-seg, webdataset, huggingface, label-studio, cvat, fiftyone"
VAL_SHARE = 0.1

Opt = typer.Option


def export(
    run: Annotated[str, typer.Argument(help="Run folder: local path or s3:// prefix", metavar="RUN")],
    to: Annotated[str, Opt(help=FORMATS, metavar="FORMAT")],
    output: Annotated[str, Opt(help="New folder: local path or s3:// prefix", metavar="URI")],
    images: Annotated[bool, Opt("--images", help="Copy the source images too; trainers need them")] = False,
    status: Annotated[list[str] | None, Opt(help="Rows of this status; repeat; default: ok")] = None,
    class_: Annotated[
        list[str] | None, Opt("--class", help="Images with this class; repeat for any of several", metavar="NAME")
    ] = None,
    min_confidence: Annotated[float | None, Opt(help="Minimum mean confidence of an image, 0 to 1")] = None,
    min_area: Annotated[float | None, Opt(help="Minimum share that one such class covers, 0 to 1")] = None,
    where: Annotated[
        str | None, Opt(help='SQL condition over the rows, e.g. "margin < 0.2"', metavar="SQL")
    ] = None,
    val_share: Annotated[
        float | None, Opt(min=0, max=1, help=f"voc, yolo-seg: share of the val split; default {VAL_SHARE}")
    ] = None,
    corrections: Annotated[str, Opt(help="Corrected masks: latest, none, or a version number")] = "latest",
    workers: WorkersOption = None,
    storage_option: StorageOption = None,
) -> None:
    """Write the masks of RUN to OUTPUT in another tool's format.

    Run the same command again to continue an interrupted export: finished shards are not read again.
    """
    from cliper.pipeline.export.base import Plan
    from cliper.pipeline.export.driver import export as write_export
    from cliper.pipeline.export.driver import find_exporter
    from cliper.pipeline.run.rows import RowFilter

    exporter = find_exporter(to)
    if val_share is not None and not exporter.splits:
        raise ConfigError(f"--val-share is for formats with a split (voc, yolo-seg); {to} has none")
    opened = read_run(run, Storage(parse_options(storage_option or [])))
    keep = RowFilter(tuple(status or ["ok"]), tuple(class_ or ()), min_confidence, min_area, where)
    share = (VAL_SHARE if val_share is None else val_share) if exporter.splits else 0.0
    plan = Plan(to, opened.uri, opened.fingerprint, class_names(opened.identity), keep, images, share)
    version = parse_version(corrections)
    try:
        with started(workers) as writers:
            done = write_export(opened, plan, output, writers, version, _report)
    except KeyboardInterrupt:
        print(f"stopped; the same command continues {output}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    print(describe(done, plan.format))
    if exporter.needs_images and not images:
        print("note      the images were not copied; trainers of this format need them: --images")


def parse_version(text: str) -> "Version":
    """A version of corrections: "latest", a number, or None for "none". Raises ConfigError."""
    if text == "latest":
        return "latest"
    if text == "none":
        return None
    if not text.isdecimal():
        raise ConfigError(f"--corrections is latest, none or a version number, not '{text}'")
    return int(text)


def describe(done: "Summary", to: str) -> str:
    """The summary of an export: images, skipped images by reason, output."""
    left_out = ", ".join(f"{reason} {count}" for reason, count in sorted(done.left_out.items()))
    return (
        f"exported  {done.images} images of {done.shards} shards in {done.seconds:.1f} s\n"
        f"left out  {sum(done.left_out.values())}{f' ({left_out})' if left_out else ''}\n"
        f"{to:<9} {done.uri}"
    )


def _report(done: int, total: int) -> None:
    if done == total or done % max(1, total // 20) == 0:
        print(f"{done} of {total} shards", file=sys.stderr, flush=True)
