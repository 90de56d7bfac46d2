"""The report of a labeling run: a self-contained HTML page of throughput, failures, classes and example masks."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from cliper.pipeline.config import embedded_note
from cliper.pipeline.corpus.manifest import Manifest
from cliper.pipeline.parallel import Workers
from cliper.pipeline.report.agreements import SUMMARY, read_summaries
from cliper.pipeline.report.gallery import (
    FAILED,
    Group,
    choose,
    class_groups,
    failed_group,
    failed_places,
    legend,
    once,
    rounds,
    that_fit,
)
from cliper.pipeline.report.images import colour
from cliper.pipeline.report.page import duration, render_page, share
from cliper.pipeline.report.run_images import read_pictures
from cliper.pipeline.report.run_stats import BINS, Collected, RunStats, collect
from cliper.pipeline.report.svg import bars, sparkline
from cliper.pipeline.report.throughput import Throughput, throughput
from cliper.pipeline.run.folder import Run, class_names
from cliper.pipeline.run.reader import open_shard
from cliper.pipeline.storage.sealed import DamagedFileError
from cliper.pipeline.storage.uris import join

CLASSES_SHOWN = 30  # with images
CLASSES_LISTED = 400  # in the table
LEGEND = 60  # classes with their colors above the images
_BAR = 6.0  # rem, the widest bar of an area


def write_run_report(run: Run, output: str, sample: int, workers: Workers = 1) -> Collected:
    """Write the page of a finished or unfinished run to the URI `output`; returns the statistics behind it.

    Reads the metadata of at most about `sample` rows, and the masks and source images of the few that are shown.
    Raises RunError if no shard is finished.
    """
    collected = collect(run, sample, workers)
    stats = collected.stats
    picks = choose(stats, by_images(stats)[:CLASSES_SHOWN])
    order = rounds(picks) + failed_places(stats)
    pictures = that_fit(read_pictures(run, collected.manifest, order), order)
    groups = class_groups(stats, label_names(run), picks, pictures) + failed_group(stats, pictures)
    page = render_run(collected, throughput(run, collected.manifest), groups)
    run.storage.write(output, page.encode())
    return collected


def render_run(collected: Collected, speed: Throughput | None, groups: Sequence[Group]) -> str:
    """The HTML page; `groups` are the images shown, by class."""
    run, stats = collected.run, collected.stats
    names = label_names(run)
    labels = by_images(stats)
    rows = [_class_row(stats, label, names[label]) for label in (0, *labels) if stats.images[label]]
    left_out = collected.manifest.left_out.lines()
    stored = run.storage.read_json(join(run.uri, "run.json"))
    agreements, damage = _agreements(run)
    shown, pictures = once(groups)
    return render_page(
        "run_report.html",
        {
            "title": f"cliper run {run.uri.rstrip('/').rpartition('/')[2]}",
            "model": model_line(run, collected.read[0]),
            "input_uri": run.identity.get("input_uri", ""),
            "fingerprint": run.fingerprint,
            "created": stored.get("created", ""),
            "notes": run_notes(run, collected.manifest, len(collected.done), len(collected.read), stats.rows)
            + damage,
            "headline": _headline(collected, speed),
            "speed": None if speed is None else _speed(speed),
            "failures": _failures(stats),
            "left_out": [line.removeprefix("left out  ").removeprefix("notice    ") for line in left_out]
            + _more_pages(stats),
            "agreements": agreements,
            "confidence": _confidence(stats),
            "classes": rows[:CLASSES_LISTED],
            "more_classes": max(0, len(rows) - CLASSES_LISTED),
            "never": [name for label, name in enumerate(names) if label and not stats.images[label]],
            "groups": shown,
            "pictures": pictures,
            "statuses": sorted(stats.statuses),
            "legend": legend((label, names[label]) for label in labels[:LEGEND]),
            "unshown": len(labels) - sum(group.name != FAILED for group in groups),
            "settings": json.dumps(run.identity, indent=2, ensure_ascii=False),
        },
    )


def _agreements(run: Run) -> tuple[list[dict[str, Any]], list[str]]:
    """The agreements with other runs, and a note if their file cannot be read."""
    try:
        return list(read_summaries(run).values()), []
    except DamagedFileError as error:
        return [], [f"{SUMMARY} is damaged ({error}): `cliper agree` writes it again."]


def _more_pages(stats: RunStats) -> list[str]:
    """A line on pages and frames that are not labeled."""
    if not stats.several:
        return []
    return [f"pages or frames behind the labeled one: {stats.several:,} files, for example {stats.several_first}"]


def label_names(run: Run) -> list[str]:
    """The name of every label, "background" first."""
    return ["background", *class_names(run.identity)]


def by_images(stats: RunStats) -> list[int]:
    """Labels of the foreground classes that occur, the most frequent first."""
    order = np.argsort(-stats.images[1:], kind="stable") + 1
    return [int(label) for label in order if stats.images[label]]


def model_line(run: Run, shard: int) -> str:
    """The model's line in a shard's file."""
    with open_shard(run, shard) as file:
        metadata = file.schema_arrow.metadata or {}
    return str(metadata.get(b"cliper.model", b"").decode())


def run_notes(run: Run, manifest: Manifest, done: int, read: int, rows: int) -> list[str]:
    """The notes on top of a page: the embedded model, an unfinished run, a sample.

    `done` shards are finished; `read` of them, with `rows` images, are shown.
    """
    notes = []
    model = run.identity.get("model", {}).get("backbone", {})
    drawn = embedded_note(model.get("model", "") if isinstance(model, dict) else "")
    if drawn is not None:
        notes.append(f"{drawn[0].upper()}{drawn[1:]}.")
    if done < manifest.shards:
        notes.append(
            f"Not finished: {done:,} of {manifest.shards:,} shards are done. "
            "`cliper label` with the same options continues the run."
        )
    if read < done:
        notes.append(
            f"Sampled: failures, classes, confidence and images are those of {rows:,} images, "
            f"{read:,} of the {done:,} finished shards chosen at random."
        )
    return notes


def _headline(collected: Collected, speed: Throughput | None) -> list[tuple[str, str]]:
    stats, manifest = collected.stats, collected.manifest
    done = manifest.images_in(set(collected.done))
    failed = stats.rows - stats.statuses["ok"]
    rate = [] if speed is None else [(f"{speed.mean:,.3g}", "images/s")]
    of = "" if done == manifest.images else f" of {manifest.images:,}"
    return [
        (f"{done:,}", f"images done{of}"),
        (share(failed / max(stats.rows, 1)), f"failed ({failed:,} of {stats.rows:,} read)"),
        (f"{np.count_nonzero(stats.images[1:]):,}", f"of {len(stats.images) - 1:,} classes found"),
        (f"{len(collected.done):,}", f"of {manifest.shards:,} shards"),
        *rate,
    ]


def _speed(speed: Throughput) -> dict[str, Any]:
    text = f"{speed.images:,} images in {duration(speed.seconds)}, {speed.mean:.3g} images/s on average"
    chart = bars(speed.rates, text, "first shard written", duration(speed.seconds), "images per second")
    if speed.pauses:
        text += f"; {speed.pauses} pauses, {duration(speed.paused_seconds)} in total, are not counted"
    return {
        "chart": chart,
        "text": f"{text}. Measured by the write times of the shard files, from the first one on.",
    }


def _failures(stats: RunStats) -> list[dict[str, Any]]:
    causes = sorted(stats.failures.items(), key=lambda item: (-item[1].images, item[0]))
    return [
        {"cause": cause, "stage": stage, "images": found.images, "examples": found.examples}
        for (cause, stage), found in causes
    ]


def _confidence(stats: RunStats) -> str:
    label = "Images by mean confidence: " + _spread(stats.confidence.tolist())
    return bars(stats.confidence.tolist(), label, "0", "1", "images by mean confidence")


def _spread(counts: Sequence[int]) -> str:
    """The interquartile range of a histogram over 0 to 1, in words."""
    total = np.cumsum(counts)
    if not total[-1]:
        return "no images"
    low, middle, high = (float(np.argmax(total >= part * total[-1]) + 0.5) / BINS for part in (0.25, 0.5, 0.75))
    return f"median about {middle:.2f}, half of them between {low:.2f} and {high:.2f}"


def _class_row(stats: RunStats, label: int, name: str) -> dict[str, Any]:
    counts = stats.class_confidence[label].tolist()
    area = float(stats.pixels[label] / max(int(stats.pixels.sum()), 1))
    return {
        "label": label,
        "name": name,
        "colour": colour(label) if label else None,
        "images": int(stats.images[label]),
        "area": area,
        "bar": round(_BAR * area / max(float(stats.pixels.max() / max(int(stats.pixels.sum()), 1)), 1e-12), 2),
        "confidence": f"{stats.mean_confidence()[label]:.2f}",
        "histogram": sparkline(counts, f"confidence of {name}: {_spread(counts)}"),
    }
