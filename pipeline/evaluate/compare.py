"""Compare two evaluations, and tabulate many."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cliper.pipeline.errors import EvaluationError
from cliper.pipeline.evaluate.bootstrap import Difference, difference
from cliper.pipeline.evaluate.counts import Counts, merge
from cliper.pipeline.evaluate.evaluation import read_counts
from cliper.pipeline.evaluate.metrics import PROTOCOLS, Floats
from cliper.pipeline.evaluate.results import Results, heading, image_miou, percent
from cliper.pipeline.report.page import render_page
from cliper.pipeline.storage.backend import Storage
from cliper.pipeline.storage.digests import checked
from cliper.pipeline.storage.sealed import DamagedFileError
from cliper.pipeline.storage.uris import join

MOST_IMAGES = 10  # listed among those that gain, and among those that lose


@dataclass(frozen=True)
class Evaluated:
    """A finished evaluation found in a run folder."""

    run_uri: str
    folder: str
    results: Results


def find_results(run_uri: str, storage: Storage) -> list[Evaluated]:
    """The finished evaluations of a run: those with a metrics.json, in the order of their folders."""
    root = join(run_uri, "evaluation")
    try:
        names = [name for name, _ in storage.list_files(root)]
    except FileNotFoundError:
        names = []
    folders = sorted({name.split("/")[0] for name in names})
    return [
        Evaluated(run_uri, join(root, folder), _content(storage, join(root, folder, protocol, "metrics.json")))
        for folder in folders
        for protocol in PROTOCOLS
        if f"{folder}/{protocol}/metrics.json" in names
    ]


def _content(storage: Storage, uri: str) -> dict[str, Any]:
    """A JSON file of an evaluation; files of before have no digest. Raises EvaluationError for a damaged one."""
    try:
        return checked(storage.read(uri), required=False)
    except DamagedFileError as error:
        again = "remove it, and run the same 'cliper evaluate' again: the counts are kept"
        raise EvaluationError(f"{uri} is damaged ({error}); {again}") from error


def matching(first_uri: str, second_uri: str, storage: Storage) -> tuple[Evaluated, Evaluated]:
    """The evaluations of two runs with the same ground truth and protocol. Raises EvaluationError."""
    first, second = find_results(first_uri, storage), find_results(second_uri, storage)
    for uri, found in ((first_uri, first), (second_uri, second)):
        if not found:
            raise EvaluationError(
                f"{uri} has no finished evaluation; run 'cliper evaluate --run {uri} --data ...'"
            )
    for a in first:
        for b in second:
            if _comparable(a.results) == _comparable(b.results):
                return a, b
    raise EvaluationError(
        f"{first_uri} and {second_uri} share no evaluation: {_names(first)} against {_names(second)}. "
        "Evaluate both on the same prepared benchmark by the same protocol"
    )


def _comparable(results: Results) -> tuple[str, str]:
    return results["truth_fingerprint"], results["protocol"]


def _names(found: Sequence[Evaluated]) -> str:
    return ", ".join(heading(entry.results) for entry in found)


@dataclass(frozen=True)
class Comparison:
    """Two evaluations of the same images, and the difference second minus first."""

    first: Evaluated
    second: Evaluated
    found: Difference
    image_ids: tuple[str, ...]
    image_miou: tuple[Floats, Floats]  # of each image, float64 [N]; nan for an image without counted pixels


def compare(first: Evaluated, second: Evaluated, storage: Storage) -> Comparison:
    """Compare two evaluations. Raises EvaluationError if their images differ."""
    ignore = tuple(_content(storage, join(first.folder, "evaluation.json"))["ignore_labels"])
    a, b = (_counts(entry, storage) for entry in (first, second))
    if a.image_ids != b.image_ids:
        raise EvaluationError(f"{first.run_uri} and {second.run_uri} were evaluated on different images")
    found = difference(a.totals, b.totals, first.results["protocol"], ignore)
    return Comparison(first, second, found, tuple(a.image_ids), (image_miou(a, ignore), image_miou(b, ignore)))


def _counts(entry: Evaluated, storage: Storage) -> Counts:
    return merge(read_counts(storage, entry.folder), len(entry.results["per_class"]) - 1)


def to_markdown(comparison: Comparison) -> str:
    """Both side by side as Markdown, the classes that differ most first."""
    first, second = comparison.first, comparison.second
    lines = [f"# {heading(first.results)}", ""]
    lines += [f"A: {first.run_uri} ({first.results['model']})", ""]
    lines += [f"B: {second.run_uri} ({second.results['model']})", ""]
    lines += ["| | A | B | B - A |", "|---|---|---|---|", *map(_line, _figures(comparison))]
    lines += ["", _verdict(comparison), ""]
    lines += ["| class | A | B | B - A |", "|---|---|---|---|", *map(_line, _classes(comparison))]
    return "\n".join(lines) + "\n"


def to_html(comparison: Comparison) -> str:
    """Both side by side as a self-contained page, with the images that differ most."""
    first, second, found = comparison.first, comparison.second, comparison.found
    classes = _classes(comparison)
    largest = max([abs(row.difference) for row in classes], default=0.0) or 1.0
    sides = [
        {"uri": side.run_uri, "model": side.results["model"], "miou": percent(side.results["miou"])}
        for side in (first, second)
    ]
    return render_page(
        "evaluations.html",
        {
            "title": heading(first.results),
            "first": sides[0],
            "second": sides[1],
            "change": _signed(found.miou),
            "span": _span(found),
            "verdict": _verdict(comparison),
            "figures": [row.cells() for row in _figures(comparison)],
            "classes": [row.cells() | {"length": round(50 * row.difference / largest, 1)} for row in classes],
            "images": _images(comparison),
        },
    )


@dataclass(frozen=True)
class _Row:
    """A line of a table: fractions of both runs, None where one has no value."""

    name: str
    a: float | None
    b: float | None

    @property
    def difference(self) -> float:
        return 0.0 if self.a is None or self.b is None else self.b - self.a

    def cells(self) -> dict[str, Any]:
        change = "-" if self.a is None or self.b is None else _signed(self.difference)
        return {"name": self.name, "a": percent(self.a), "b": percent(self.b), "change": change}


def _figures(comparison: Comparison) -> list[_Row]:
    names = {
        "miou": "mIoU",
        "pixel_accuracy": "pixel accuracy",
        "mean_accuracy": "mean accuracy",
        "frequency_weighted_iou": "frequency-weighted IoU",
        "boundary_iou": "boundary IoU",
    }
    a, b = comparison.first.results, comparison.second.results
    return [_Row(name, a[key], b[key]) for key, name in names.items()]


def _classes(comparison: Comparison) -> list[_Row]:
    """The classes in the mean of either run, the largest difference first."""
    both = zip(comparison.first.results["per_class"], comparison.second.results["per_class"], strict=True)
    pairs = [(x, y) for x, y in both if x["counted"] or y["counted"]]
    pairs.sort(key=lambda pair: -abs((pair[1]["iou"] or 0) - (pair[0]["iou"] or 0)))
    return [_Row(x["name"], x["iou"], y["iou"]) for x, y in pairs]


def _images(comparison: Comparison) -> list[tuple[str, list[dict[str, Any]]]]:
    """The images that gain most from A to B, and those that lose most."""
    a, b = comparison.image_miou
    change = b - a
    known = np.flatnonzero(~np.isnan(change))
    order = known[np.argsort(-change[known], kind="stable")]
    gain, loss = order[:MOST_IMAGES], order[::-1][:MOST_IMAGES]
    groups = [("Images that gain most", gain[change[gain] > 0]), ("Images that lose most", loss[change[loss] < 0])]
    return [
        (title, [_Row(comparison.image_ids[i], float(a[i]), float(b[i])).cells() for i in places.tolist()])
        for title, places in groups
    ]


def _verdict(comparison: Comparison) -> str:
    found, images = comparison.found, comparison.first.results["images"]
    return (
        f"B - A in mIoU: {_signed(found.miou)}, 95% interval {_span(found)} "
        f"(paired bootstrap over {images} images); B is better in {100 * found.share_better:.1f}% of the draws."
    )


def _span(found: Difference) -> str:
    return f"{_signed(found.interval.low)} to {_signed(found.interval.high)}"


def _line(row: _Row) -> str:
    cells = row.cells()
    return f"| {cells['name']} | {cells['a']} | {cells['b']} | {cells['change']} |"


def _signed(value: float) -> str:
    return f"{100 * value:+.2f}"


def table(all_results: Iterable[Results]) -> str:
    """Results in percent as Markdown: a row per setting, a column per benchmark, each "measured (published)".

    An asterisk marks a benchmark that was not complete.
    """
    found = list(all_results)
    columns = list(dict.fromkeys(results["benchmark"] for results in found))
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    for results in found:
        row = (results["protocol"], results["backbone"], results["variant"])
        cells.setdefault(row, {})[results["benchmark"]] = _cell(results)
    lines = ["| protocol | backbone | setting | " + " | ".join(columns) + " |", "|---" * (3 + len(columns)) + "|"]
    lines += ["| " + " | ".join([*row, *(cells[row].get(c, "-") for c in columns)]) + " |" for row in cells]
    return "\n".join(lines) + "\n"


def _cell(results: Results) -> str:
    published = "" if results["published_miou"] is None else f" ({100 * results['published_miou']:.1f})"
    measured = "-" if results["miou"] is None else f"{100 * results['miou']:.1f}"
    partial = "" if results["images"] == results["images_expected"] else "*"
    return f"{measured}{partial}{published}"


@dataclass(frozen=True)
class Ranked:
    """A segmenter's results on a benchmark, and the hashes of its weights."""

    segmenter: str
    results: Results
    weights: Mapping[str, str]


def leaderboard_table(rows: Sequence[Ranked]) -> str:
    """Markdown with a row per segmenter and benchmark, the best of each benchmark first.

    An asterisk marks a benchmark that was not complete.
    """
    order = list(dict.fromkeys(row.results["benchmark"] for row in rows))
    ranked = sorted(
        rows, key=lambda row: (order.index(row.results["benchmark"]), -(row.results["miou"] or 0.0), row.segmenter)
    )
    lines = ["| benchmark | segmenter | mIoU | 95% interval | protocol | labels by | weights |", "|---" * 7 + "|"]
    for row in ranked:
        found, between = row.results, row.results["miou_interval"]
        partial = "" if found["images"] == found["images_expected"] else "*"
        span = "-" if between is None else f"{percent(between[0])} to {percent(between[1])}"
        weights = ", ".join(f"{name} {digest[:8]}" for name, digest in row.weights.items()) or "-"
        cells = [found["benchmark"] + partial, row.segmenter, percent(found["miou"]), span, found["protocol"]]
        lines.append("| " + " | ".join([*cells, _rule(found), weights]) + " |")
    return "\n".join(lines) + "\n"


def _rule(results: Results) -> str:
    """How labels were decided: the protocol of CLIPer's labels, or the segmenter's own rule."""
    return str(results["decided_by"]) if "CLIPer" in results["model"][:6] else "its own rule"
