"""`cliper prepare`: convert a downloaded benchmark to the form that `cliper evaluate` reads."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from cliper.jobs.storage_options import StorageOption, parse_options
from cliper.pipeline.evaluate.prepare.write import prepare as write_prepared
from cliper.pipeline.evaluate.prepared import Prepared
from cliper.pipeline.storage.backend import Storage

Opt = typer.Option

PROGRESS_EVERY = 500


def prepare(
    benchmark: Annotated[
        str,
        typer.Argument(
            help="voc21, voc20, context60, context59, coco_object, coco_stuff, ade20k, cityscapes, or folder",
            metavar="BENCHMARK",
        ),
    ],
    root: Annotated[Path, Opt(help="Folder of the unpacked download", metavar="DIR")],
    output: Annotated[str | None, Opt(help="Default: ROOT/prepared/BENCHMARK", metavar="URI")] = None,
    truth: Annotated[
        str | None,
        Opt(
            help="Kind of ground truth, e.g. aug (voc), mat, json, png (context), stuff (coco_object), whole",
            metavar="KIND",
        ),
    ] = None,
    allow_partial: Annotated[bool, Opt("--allow-partial", help="Accept fewer images than published")] = False,
    copy_images: Annotated[bool, Opt("--copy-images", help="Copy the images too, for other machines")] = False,
    storage_option: StorageOption = None,
) -> None:
    """Check a downloaded benchmark and write its image list and its ground truth to OUTPUT."""
    target = output or str(root / "prepared" / benchmark)
    storage = Storage(parse_options(storage_option or []))
    done = write_prepared(benchmark, root, target, storage, truth, allow_partial, copy_images, _report)
    print(describe(done))


def describe(prepared: Prepared) -> str:
    """One-line summary: images, classes, ground truth, URI; marks an incomplete benchmark."""
    short = "" if prepared.complete else f" of {prepared.expected}: not the published benchmark"
    return (
        f"{prepared.benchmark}: {prepared.images} images{short}, {len(prepared.class_names)} classes, "
        f"ground truth '{prepared.truth_form}' ({prepared.fingerprint}) in {prepared.uri}"
    )


def _report(count: int) -> None:
    if count % PROGRESS_EVERY == 0:
        print(f"{count} images", file=sys.stderr, flush=True)
