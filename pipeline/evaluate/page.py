"""Write an evaluation's results: metrics.json, per_class.csv, per_class.tex, report.md, a self-contained page."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
from PIL import Image

from cliper.pipeline.evaluate.charts import confusions, heat_map, taken_for
from cliper.pipeline.evaluate.counts import Counts
from cliper.pipeline.evaluate.evaluation import Evaluation, counted_shards
from cliper.pipeline.evaluate.results import (
    Results,
    by_iou,
    figures,
    heading,
    image_miou,
    percent,
    to_csv,
    to_latex,
    to_markdown,
)
from cliper.pipeline.report.images import colour, overlay, picture
from cliper.pipeline.report.page import data_uri, render_page
from cliper.pipeline.run.masks import decode_png, unpack_mask
from cliper.pipeline.run.reader import open_shard
from cliper.pipeline.storage.digests import with_digest
from cliper.pipeline.storage.uris import join

EXTREMES = 4  # best and worst images shown


def write_report(evaluation: Evaluation, counts: Counts, results: Results) -> str:
    """Write all forms of the results to the evaluation folder; returns the URI of the HTML page.

    metrics.json is written last: its presence marks a complete evaluation. It holds a digest of its content.
    """
    folder = join(evaluation.folder, results["protocol"])
    storage = evaluation.run.storage
    page = render(results, extreme_images(evaluation, counts))
    storage.write(join(folder, "index.html"), page.encode())
    storage.write(join(folder, "per_class.csv"), to_csv(results).encode())
    storage.write(join(folder, "per_class.tex"), to_latex(results).encode())
    storage.write(join(folder, "report.md"), to_markdown(results).encode())
    storage.write(join(folder, "metrics.json"), with_digest(results))
    return join(folder, "index.html")


def render(results: Results, groups: Sequence[Mapping[str, Any]]) -> str:
    """The self-contained HTML page. `groups`: see `extreme_images`."""
    between = results["miou_interval"]
    return render_page(
        "report.html",
        {
            "title": heading(results),
            "notes": _notes(results),
            "miou": percent(results["miou"]),
            "published": percent(results["published_miou"]),
            "span": "-" if between is None else f"{percent(between[0])} to {percent(between[1])}",
            "figures": figures(results)[3:],
            "heat": heat_map(results),
            "confusions": confusions(results),
            "groups": groups,
            "classes": _class_rows(results),
            "files": [
                ("per_class.csv", data_uri("text/csv", to_csv(results))),
                ("per_class.tex", data_uri("text/plain", to_latex(results))),
                ("report.md", data_uri("text/plain", to_markdown(results))),
            ],
        },
    )


def _notes(results: Results) -> list[str]:
    notes = []
    if results["images"] != results["images_expected"]:
        notes.append(
            f"Only {results['images']} of the benchmark's {results['images_expected']} images: "
            "these figures are not comparable with published ones."
        )
    if results["failed_images"]:
        notes.append(f"{len(results['failed_images'])} images have no mask; all their pixels count as wrong.")
    return notes


def _class_rows(results: Results) -> list[dict[str, Any]]:
    """Every class: those in the mean by ascending IoU, then the others."""
    counted = by_iou(results)[::-1]
    others = [entry for entry in results["per_class"] if not entry["counted"]]
    mistaken = taken_for(results)
    truth = max(sum(entry["truth_pixels"] for entry in results["per_class"]), 1)
    predicted = max(sum(entry["predicted_pixels"] for entry in results["per_class"]), 1)
    return [
        {
            "name": entry["name"],
            "colour": colour(entry["class_id"]),
            "counted": entry["counted"],
            "share": entry["iou"] or 0.0,
            "iou": percent(entry["iou"]),
            "accuracy": percent(entry["accuracy"]),
            "boundary": percent(entry["boundary_iou"]),
            "truth": entry["truth_pixels"] / truth,
            "predicted": entry["predicted_pixels"] / predicted,
            "mistaken": mistaken[entry["class_id"]],
            "worst": [(image["image_id"], percent(image["iou"])) for image in entry["worst_images"]],
        }
        for entry in [*counted, *others]
    ]


def extreme_images(evaluation: Evaluation, counts: Counts) -> list[dict[str, Any]]:
    """The best and the worst images with photo, truth and prediction as data URIs, ready for the template."""
    miou = image_miou(counts, evaluation.prepared.ignore_labels)
    order = [int(i) for i in np.argsort(miou, kind="stable") if not np.isnan(miou[i])]  # nan: nothing was counted
    order = [i for i in order if counts.image_ids[i] not in counts.failed]
    best, worst = order[::-1][:EXTREMES], order[:EXTREMES]
    masks = _find_masks(evaluation, {counts.image_ids[i] for i in best + worst})
    shown = {i: _shown(evaluation, counts.image_ids[i], float(miou[i]), masks) for i in {*best, *worst}}
    groups = [("Best images", best), ("Worst images", worst)]
    return [{"title": title, "images": [shown[i] for i in members]} for title, members in groups if members]


def _find_masks(evaluation: Evaluation, wanted: set[str]) -> dict[str, npt.NDArray[Any]]:
    """Decode the masks of a few images; reads a shard's ids first, and its masks only if one is needed."""
    counter, storage = evaluation.counter(), evaluation.run.storage
    masks: dict[str, npt.NDArray[Any]] = {}
    for shard in sorted(counted_shards(storage, evaluation.folder)):
        if len(masks) == len(wanted):
            break
        with open_shard(evaluation.run, shard) as file:
            ids = [counter.benchmark_id(i) for i in file.read(columns=["image_id"]).column(0).to_pylist()]
            places = [place for place, name in enumerate(ids) if name in wanted]
            if not places:
                continue
            rows = file.read(columns=["mask", "mask_codec"]).take(places).to_pylist()
        for place, row in zip(places, rows, strict=True):
            masks[str(ids[place])] = unpack_mask(row)
    return masks


def _shown(
    evaluation: Evaluation, image_id: str, miou: float, masks: Mapping[str, npt.NDArray[Any]]
) -> dict[str, Any]:
    prepared, storage = evaluation.prepared, evaluation.run.storage
    index = prepared.index()
    [row] = index.filter(pc.equal(index["image_id"], image_id)).to_pylist()
    uri = row["uri"] if "://" in row["uri"] or row["uri"].startswith("/") else join(prepared.uri, row["uri"])
    with Image.open(io.BytesIO(storage.read(uri))) as image:
        photo = np.asarray(image.convert("RGB"))
    truth, prediction = decode_png(storage.read(join(prepared.uri, row["truth"]))), masks[image_id]
    names = ["background", *prepared.class_names]
    ignored = truth[truth >= len(names)]
    uncounted = [{"name": "not counted", "colour": colour(int(ignored[0]))}] if ignored.size else []
    present = np.union1d(truth[truth < len(names)], prediction[prediction < len(names)]).tolist()
    return {
        "image_id": image_id,
        "miou": percent(miou),
        "photo": picture(photo),
        "truth": picture(overlay(photo, truth)),
        "prediction": picture(overlay(photo, prediction)),
        "labels": [{"name": names[label], "colour": colour(label)} for label in present] + uncounted,
    }
