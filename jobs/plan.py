"""`cliper plan`: estimate time, output and cost of labeling a corpus from a labeled sample."""

import sys
from typing import Annotated

import typer

from cliper.jobs.options import InputOptions, with_input, with_preset
from cliper.jobs.storage_options import StorageOption, parse_options
from cliper.pipeline.config import classes_for, describe_classes, load_config
from cliper.pipeline.corpus.left_out import LeftOut
from cliper.pipeline.corpus.sources import list_entries, no_images
from cliper.pipeline.label.estimate import Corpus, Estimate, Measured, estimate, measure, sample_corpus
from cliper.pipeline.label.segmenters import chosen
from cliper.pipeline.storage.backend import Storage

Opt = typer.Option
LISTED_EVERY = 100_000


def plan(
    *,
    input: Annotated[str, Opt(help="As for `cliper label`", metavar="URI")],
    classes: Annotated[
        str | None, Opt(help="Class file, or a shipped list; required with real weights", metavar="FILE")
    ] = None,
    config: Annotated[str, Opt(help="YAML file or a shipped config", metavar="FILE")] = "tiny",
    preset: Annotated[str, Opt(help="exact, fast, fast-384, fast-256 or clip-only", metavar="NAME")] = "exact",
    sample: Annotated[int, Opt(min=1, help="Images to label for the estimate")] = 64,
    actors: Annotated[int, Opt(min=1, help="Actors (GPUs) that the run will have")] = 1,
    price: Annotated[float | None, Opt(min=0, help="Price of an actor (GPU) per hour")] = None,
    seed: Annotated[int, Opt(help="Random seed of the sample")] = 0,
    reading: InputOptions,
    storage_option: StorageOption = None,
) -> None:
    """Label a sample of INPUT on this machine and estimate the whole run.

    Run it on the kind of machine that the run will use. Nothing is written. One actor is measured; actors are
    independent, so throughput scales with their number as long as the storage keeps up (the line `reading`
    shows the rate of one reader).
    """
    kind, settings = chosen(with_input(with_preset(load_config(config), preset), reading))
    class_list = classes_for(classes, settings)
    settings = kind.pin(settings)
    kind.identity(settings)  # raises for missing or unusable weights before the input is listed
    storage = Storage(parse_options(storage_option or []))
    left_out = LeftOut()
    corpus = sample_corpus(list_entries(storage, input, settings.input, left_out), sample, seed, _report)
    if not corpus.images:
        raise no_images(input, left_out)
    for line in left_out.lines():
        print(line, file=sys.stderr, flush=True)
    measured = measure(corpus.sample, storage, kind.make, settings, class_list)
    print(f"model     {kind.describe(settings)}")
    print(f"classes   {describe_classes(class_list)}")
    print("\n".join(describe(corpus, measured, estimate(corpus, measured, actors, price), actors, price)))


def describe(corpus: Corpus, measured: Measured, whole: Estimate, actors: int, price: float | None) -> list[str]:
    """The estimate, a line per quantity."""
    low, high = min(measured.part_rates), max(measured.part_rates)
    size = "" if corpus.bytes is None else f", {human(corpus.bytes)}"
    reading = measured.images / max(measured.load_seconds, 1e-9)
    image_bytes, mask_bytes = measured.input_bytes / measured.images, measured.output_bytes / measured.images
    lines = [
        f"sample    {measured.images} images, {measured.failed} failed; {measured.rate:.3g} images/s per actor "
        f"(parts of it {low:.3g} to {high:.3g}), after {measured.start_seconds:.1f} s of start",
        f"reading   {reading:.3g} images/s by one reader, {human(image_bytes)} an image",
        f"corpus    {corpus.images} images{size}",
        f"time      {whole.actor_hours:.3g} actor hours; {whole.hours:.3g} hours on {actors} actor(s)",
        f"output    about {human(whole.output_bytes)}, {human(mask_bytes)} an image",
    ]
    if whole.cost is not None:
        lines.append(f"cost      {whole.cost:,.2f} at {price:g} an hour")
    return lines


def human(size: float) -> str:
    """A number of bytes with a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _report(count: int) -> None:
    if count % LISTED_EVERY == 0:
        print(f"listed {count} images", file=sys.stderr, flush=True)
