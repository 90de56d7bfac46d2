"""Compute results from merged counts: a dictionary for JSON, and its CSV, LaTeX and Markdown forms.

Ratios are fractions (0 to 1) in JSON and CSV, and percent in Markdown and HTML. A ratio without denominator is
null.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cliper.pipeline.evaluate import bootstrap
from cliper.pipeline.evaluate.counts import Counts
from cliper.pipeline.evaluate.metrics import Floats, Protocol, Scores, ratio, score

WORST_IMAGES = 5  # per class
MOST_DRAWN_IMAGES = 100_000  # above, the interval is far narrower than what it would be read for
RESULTS_VERSION = 1

Results = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """The names shown for an evaluation. `published_miou` is a fraction, None if nothing is published."""

    protocol: Protocol
    decided_by: Protocol  # the protocol the labels were decided by
    name: str = ""
    backbone: str = ""
    variant: str = ""
    model: str = ""
    published_miou: float | None = None


def summarise(
    counts: Counts, identity: Mapping[str, Any], setting: Setting, expected: int = 0, draws: int = bootstrap.DRAWS
) -> Results:
    """All results of an evaluation as JSON values.

    `identity`: of the evaluation folder. `expected`: published number of images, 0 for any.
    """
    ignore = tuple(identity["ignore_labels"])
    scores = score(counts.confusion, setting.protocol, ignore)
    drawn = 0 < len(counts.image_ids) <= MOST_DRAWN_IMAGES
    spread = bootstrap.drawn_miou(counts.totals, setting.protocol, ignore, draws) if drawn else None
    between = bootstrap.interval(spread) if spread is not None else None
    return {
        "results_version": RESULTS_VERSION,
        "benchmark": identity["benchmark"],
        "truth_form": identity["truth_form"],
        "protocol": setting.protocol,
        "decided_by": setting.decided_by,
        "setting": setting.name,
        "backbone": setting.backbone,
        "variant": setting.variant,
        "model": setting.model,
        "miou": _number(scores.miou),
        "published_miou": setting.published_miou,
        "miou_interval": None if between is None else [_number(between.low), _number(between.high)],
        "pixel_accuracy": _number(scores.pixel_accuracy),
        "mean_accuracy": _number(scores.mean_accuracy),
        "frequency_weighted_iou": _number(scores.frequency_weighted_iou),
        "boundary_iou": _number(_boundary_mean(counts, scores)),
        "classes_counted": int(scores.counted.sum()),
        "images": len(counts.image_ids),
        "images_expected": expected or len(counts.image_ids),
        "failed_images": list(counts.failed),
        "pixels": int(counts.confusion.sum()),
        "ignored_pixels": counts.ignored_pixels,
        "per_class": _per_class(counts, scores, ["background", *identity["class_names"]]),
        "confusion": counts.confusion.tolist(),
        "fingerprint": identity["run"],
        "truth_fingerprint": identity["truth"],
    }


def _boundary_mean(counts: Counts, scores: Scores) -> float:
    """Boundary IoU over the classes that enter the mIoU."""
    values = ratio(counts.boundary[0], counts.boundary[1])[scores.counted]
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _per_class(counts: Counts, scores: Scores, names: Sequence[str]) -> list[Results]:
    contour = ratio(counts.boundary[0], counts.boundary[1])
    return [
        {
            "class_id": k,
            "name": name,
            "counted": bool(scores.counted[k]),
            "iou": _number(scores.iou[k]),
            "accuracy": _number(scores.accuracy[k]),
            "boundary_iou": _number(contour[k]),
            "truth_pixels": int(scores.truth_pixels[k]),
            "predicted_pixels": int(scores.predicted_pixels[k]),
            "worst_images": _worst(counts, k),
        }
        for k, name in enumerate(names)
    ]


def _worst(counts: Counts, k: int) -> list[Results]:
    """The images that hold the class, by ascending IoU; ties by id."""
    agree, truth, predicted = counts.totals[:, :, k].T  # each [N]
    holds = np.flatnonzero(truth)
    iou = agree[holds] / (truth + predicted - agree)[holds]
    order = holds[np.argsort(iou, kind="stable")[:WORST_IMAGES]]
    return [
        {"image_id": counts.image_ids[i], "iou": float(agree[i] / (truth[i] + predicted[i] - agree[i]))}
        for i in order
    ]


def image_miou(counts: Counts, ignore_labels: Sequence[int]) -> Floats:
    """Mean IoU of every image over the classes in its truth or prediction: float64 [N], nan without pixels."""
    agree, truth, predicted = np.moveaxis(counts.totals, 1, 0)  # each [N, K + 1]
    union = truth + predicted - agree
    listed = ~np.isin(np.arange(union.shape[1]), ignore_labels)
    present = (union > 0) & listed
    iou = np.where(present, np.nan_to_num(ratio(agree, union)), 0.0)
    return np.where(present.any(axis=1), iou.sum(axis=1) / np.maximum(present.sum(axis=1), 1), np.nan)


def to_csv(results: Results) -> str:
    """CSV with one line per class."""
    columns = [
        "class_id",
        "name",
        "counted",
        "iou",
        "accuracy",
        "boundary_iou",
        "truth_pixels",
        "predicted_pixels",
    ]
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(results["per_class"])
    return out.getvalue()


def to_markdown(results: Results) -> str:
    """A Markdown page: the figures, then the classes by descending IoU."""
    lines = [f"# {heading(results)}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in figures(results)]
    lines += ["", "| class | IoU | accuracy | boundary IoU |", "|---|---|---|---|"]
    for entry in by_iou(results):
        values = " | ".join(percent(entry[key]) for key in ("iou", "accuracy", "boundary_iou"))
        lines.append(f"| {entry['name']} | {values} |")
    return "\n".join(lines) + "\n"


_LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$"}
)


def to_latex(results: Results) -> str:
    """A LaTeX table (package booktabs) of the classes in the mean, by descending IoU, and the mean, in percent."""
    rows = [(entry["name"], entry) for entry in by_iou(results)]
    mean = {"iou": results["miou"], "accuracy": results["mean_accuracy"], "boundary_iou": results["boundary_iou"]}
    lines = [f"% {' '.join(heading(results).split())}", r"\begin{tabular}{lrrr}", r"\toprule"]
    lines += [r"class & IoU & accuracy & boundary IoU \\", r"\midrule"]
    lines += [_latex_row(name, entry) for name, entry in rows]
    lines += [r"\midrule", _latex_row("mean", mean), r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines) + "\n"


def _latex_row(name: str, entry: Mapping[str, Any]) -> str:
    values = [percent(entry[key]).replace("-", "--") for key in ("iou", "accuracy", "boundary_iou")]
    return " & ".join([name.translate(_LATEX), *values]) + r" \\"


def heading(results: Results) -> str:
    """E.g. "voc21, ViT-B/16, sliding (protocol cliper)"."""
    what = ", ".join(part for part in (results["benchmark"], results["backbone"], results["variant"]) if part)
    return f"{what} (protocol {results['protocol']})"


def figures(results: Results) -> list[tuple[str, str]]:
    """The main figures as (name, value) in percent."""
    between = results["miou_interval"]
    span = "not computed" if between is None else f"{percent(between[0])} to {percent(between[1])}"
    images, expected = results["images"], results["images_expected"]
    rows = [
        ("mIoU", percent(results["miou"])),
        ("published mIoU", percent(results["published_miou"])),
        ("95% interval (bootstrap over images)", span),
        ("pixel accuracy", percent(results["pixel_accuracy"])),
        ("mean accuracy", percent(results["mean_accuracy"])),
        ("frequency-weighted IoU", percent(results["frequency_weighted_iou"])),
        ("boundary IoU", percent(results["boundary_iou"])),
        ("classes in the mean", str(results["classes_counted"])),
        ("images", str(images) if images == expected else f"{images} of {expected}: not the published benchmark"),
    ]
    if results["ignored_pixels"]:
        every = results["ignored_pixels"] + results["pixels"]
        rows.append(("pixels not counted (no ground truth)", percent(results["ignored_pixels"] / every)))
    if results["failed_images"]:
        rows.append(("images without a mask, counted as wrong", str(len(results["failed_images"]))))
    if (proposed := results.get("proposals")) is not None:
        rows.append(("present classes that were proposed", percent(proposed["recall"])))
        rows.append(("classes proposed per image", f"{proposed['mean']:.2f}"))
    if results["decided_by"] != results["protocol"]:
        rows.append(("labels decided by", f"protocol {results['decided_by']}"))
    return [*rows, ("model", results["model"] or "-"), ("run", results["fingerprint"])]


def by_iou(results: Results) -> list[Results]:
    """The classes in the mean, by descending IoU."""
    counted = [entry for entry in results["per_class"] if entry["counted"]]
    return sorted(counted, key=lambda entry: (-entry["iou"], entry["class_id"]))


def percent(value: float | None) -> str:
    """A fraction as percent with two digits; "-" for none."""
    return "-" if value is None else f"{100 * value:.2f}"


def _number(value: Any) -> float | None:
    """A float for JSON: None instead of nan."""
    return None if math.isnan(value) else float(value)
