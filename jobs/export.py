"""`cliper export`: the masks of a run in the formats that trainers and labeling tools read."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cliper.jobs.storage_options import StorageOption, parse_options
from cliper.jobs.workers import WorkersOption, started
from cliper.model.errors import ConfigError
from cliper.pipeline.config import counted
from cliper.pipeline.run.folder import read_run
from cliper.pipeline.storage.backend import Storage
from cliper.pipeline.storage.uris import is_local

if TYPE_CHECKING:
    from cliper.pipeline.export.base import Exporter, Plan
    from cliper.pipeline.export.driver import Summary
    from cliper.pipeline.export.options import Options, Segmentation
    from cliper.pipeline.run.corrections import Version
    from cliper.pipeline.run.rows import RowFilter

INTERRUPTED = 130
FORMATS = (
    "coco, coco-panoptic, coco-results, voc, yolo-seg, yolo-detect, webdataset, huggingface, label-studio, cvat, "
    "fiftyone, labelme, datumaro, cityscapes, ade, sagemaker"
)

Opt = typer.Option


@dataclass(frozen=True)
class Chosen:
    """Options on the rows to export."""

    status: Annotated[list[str] | None, Opt(help="Rows of this status; repeat; default: ok", metavar="STATUS")] = (
        None
    )
    class_: Annotated[
        list[str] | None, Opt("--class", help="Images with this class; repeat for any of several", metavar="NAME")
    ] = None
    min_confidence: Annotated[float | None, Opt(min=0, max=1, help="Minimum mean confidence of an image")] = None
    min_area: Annotated[float | None, Opt(min=0, max=1, help="Minimum share that one such class covers")] = None
    where: Annotated[str | None, Opt(help='SQL condition over the rows, e.g. "margin < 0.2"', metavar="SQL")] = (
        None
    )

    def rows(self) -> "RowFilter":
        """The condition on rows. Raises ExportError for SQL that is no condition."""
        from cliper.pipeline.run.rows import RowFilter

        names = tuple(self.status or ["ok"]), tuple(self.class_ or ())
        return RowFilter(*names, self.min_confidence, self.min_area, self.where)


@dataclass(frozen=True)
class Splits:
    """Options on the splits."""

    val_share: Annotated[
        float | None,
        Opt(min=0, max=1, help="Share of the val split; default: 0.1 for voc, yolo, cityscapes, ade"),
    ] = None
    test_share: Annotated[float, Opt(min=0, max=1, help="Share of the test split")] = 0.0
    split_by: Annotated[
        str,
        Opt(help="Keep groups in one split: image, folder, or a regular expression over ids", metavar="GROUP"),
    ] = "image"
    split_list: Annotated[
        Path | None, Opt(help="Lines 'image_id,split' of images with a given split", metavar="FILE")
    ] = None


@dataclass(frozen=True)
class Regions:
    """Options on regions, polygons and doubtful classes."""

    segmentation: Annotated[str, Opt(help="coco: rle, rle-uncompressed or polygon", metavar="FORM")] = "rle"
    instances: Annotated[bool, Opt("--instances", help="An annotation per connected region of a class")] = False
    things: Annotated[
        Path | None, Opt(help="Instances of these classes only, one per line; others are stuff", metavar="FILE")
    ] = None
    min_region: Annotated[int, Opt(min=0, help="Smaller regions become background", metavar="PIXELS")] = 0
    fill_holes: Annotated[int, Opt(min=0, help="Smaller holes take the class around them", metavar="PIXELS")] = 0
    simplify: Annotated[
        float, Opt(min=0, help="coco polygons, yolo-seg, labelme: tolerance; prints the IoU", metavar="PIXELS")
    ] = 0.0
    ignore_below: Annotated[
        float | None, Opt(min=0, max=1, help="Classes of lower confidence in an image become the ignore value")
    ] = None


@dataclass(frozen=True)
class ClassChanges:
    """Options on the classes of the export."""

    rename: Annotated[
        list[str] | None, Opt(help="Rename a class; repeat; the same new name merges", metavar="OLD=NEW")
    ] = None
    drop: Annotated[list[str] | None, Opt(help="Turn a class into background; repeat", metavar="NAME")] = None
    background: Annotated[
        str | None, Opt(help="Export background pixels as a class of this name", metavar="NAME")
    ] = None


def export(
    run: Annotated[str, typer.Argument(help="Run folder: local path or s3:// prefix", metavar="RUN")],
    to: Annotated[str, Opt(help=FORMATS, metavar="FORMAT")],
    output: Annotated[str, Opt(help="New folder: local path or s3:// prefix", metavar="URI")],
    images: Annotated[bool, Opt("--images", help="Copy the source images too; trainers need them")] = False,
    chosen: Chosen = Chosen(),
    splits: Splits = Splits(),
    regions: Regions = Regions(),
    changes: ClassChanges = ClassChanges(),
    corrections: Annotated[
        str, Opt(help="Corrected masks: latest, none, or a version number", metavar="VERSION")
    ] = "latest",
    push: Annotated[
        str | None,
        Opt(help="huggingface: upload it as a dataset; needs HF_TOKEN or 'hf auth login'", metavar="OWNER/NAME"),
    ] = None,
    private: Annotated[bool, Opt("--private", help="With --push: a private repository")] = False,
    workers: WorkersOption = None,
    storage_option: StorageOption = None,
) -> None:
    """Write the masks of RUN to OUTPUT in another tool's format.

    Run the same command again to continue an interrupted export: finished shards are not read again.
    """
    from cliper.pipeline.export.driver import export as write_export
    from cliper.pipeline.export.driver import find_exporter, make_plan

    exporter = find_exporter(to)
    options = options_of(splits, regions, changes)
    opened = read_run(run, Storage(parse_options(storage_option or [])))
    plan = make_plan(opened, to, chosen.rows(), images, options)
    version = parse_version(corrections)
    address = open_push(push, private, to, output)
    try:
        with started(workers) as writers:
            done = write_export(opened, plan, output, writers, version, _report)
    except KeyboardInterrupt:
        print(f"stopped; the same command continues {output}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    print(describe(done, plan.format))
    for note in notes(done, plan, exporter):
        print(f"note      {note}")
    if push is not None:
        from cliper.pipeline.export.hub import upload

        upload(done.uri, push, f"cliper run {plan.fingerprint}")
        print(f"pushed    {address}")


def options_of(splits: Splits, regions: Regions, changes: ClassChanges) -> "Options":
    """The options that change what an exporter writes. Raises ConfigError."""
    from cliper.pipeline.export.options import Options

    return Options(
        val_share=splits.val_share,
        test_share=splits.test_share,
        split_by=splits.split_by,
        listed=read_splits(splits.split_list),
        segmentation=parse_segmentation(regions.segmentation),
        instances=regions.instances or regions.things is not None,
        things=read_names(regions.things),
        min_region=regions.min_region,
        fill_holes=regions.fill_holes,
        simplify=regions.simplify,
        ignore_below=regions.ignore_below,
        rename=dict(parse_rename(text) for text in changes.rename or ()),
        drop=tuple(changes.drop or ()),
        background=changes.background,
    )


def open_push(push: str | None, private: bool, to: str, output: str) -> str:
    """The address of the repository to push to, or "". Raises ConfigError or ExportError before any work."""
    if push is None:
        if private:
            raise ConfigError("--private has no effect without --push OWNER/NAME")
        return ""
    if to != "huggingface" or not is_local(output):
        raise ConfigError(
            "--push uploads a local folder of the format huggingface: --to huggingface --output FOLDER"
        )
    from cliper.pipeline.export.hub import open_repository

    return open_repository(push, private)


def notes(done: "Summary", plan: "Plan", exporter: "Exporter") -> Iterator[str]:
    """Problems that a trainer would run into."""
    yield from exporter.notes(plan)
    if exporter.needs_images and not plan.images:
        yield "the images were not copied; trainers of this format need them: --images"
    shares = {"val": plan.options.val_share or 0.0, "test": plan.options.test_share}
    for split, share in shares.items():
        if share and not done.splits.get(split):
            yield f"the {split} split is empty: trainers refuse it; raise --{split}-share, or use --split-list"


def read_splits(path: Path | None) -> dict[str, str]:
    """Image id to split, from lines "image_id,split". Raises ConfigError."""
    if path is None:
        return {}
    pairs = [line.rpartition(",") for line in _lines(path)]
    wrong = [name + split for name, comma, split in pairs if not comma]
    if wrong:
        raise ConfigError(f"{path}: '{wrong[0]:.80}' is not a line 'image_id,split'")
    return {image_id.strip(): split.strip() for image_id, _, split in pairs}


def read_names(path: Path | None) -> tuple[str, ...]:
    """Class names, one per line; none without a file. Raises ConfigError."""
    return () if path is None else tuple(_lines(path))


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def parse_rename(text: str) -> tuple[str, str]:
    """("old", "new") of "old=new". Raises ConfigError."""
    old, separator, new = (part.strip() for part in text.partition("="))
    if not (separator and old and new):
        raise ConfigError(f"--rename takes OLD=NEW, not '{text}'")
    return old, new


def parse_segmentation(text: str) -> "Segmentation":
    """One of COCO's forms of masks. Raises ConfigError."""
    from cliper.pipeline.export.options import SEGMENTATIONS

    for known in SEGMENTATIONS:
        if text == known:
            return known
    raise ConfigError(f"--segmentation is {', '.join(SEGMENTATIONS)}, not '{text}'")


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
    splits = ", ".join(f"{split} {count}" for split, count in sorted(done.splits.items()))
    more = f"splits    {splits}\n" if splits else ""
    if done.iou is not None:
        more += f"polygons  IoU with the masks {done.iou:.4f}\n"
    return (
        f"exported  {counted(done.images, 'image')} of {counted(done.shards, 'shard')} in {done.seconds:.1f} s\n"
        f"left out  {sum(done.left_out.values())}{f' ({left_out})' if left_out else ''}\n"
        f"{more}{to:<9} {done.uri}"
    )


def _report(done: int, total: int) -> None:
    if done == total or done % max(1, total // 20) == 0:
        print(f"{done} of {counted(total, 'shard')}", file=sys.stderr, flush=True)
