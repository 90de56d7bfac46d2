"""How far the masks of several runs over the same images agree. No ground truth, no model.

agreement/DIGEST/                  inside the first run's folder; the digest identifies the runs
    agreement.json                 the runs and their classes; written first
    counts/shard-000000.parquet    sparse counts per image and pair of runs (AGREEMENT); its presence is the commit
    images.parquet                 agreement of every image, the least first
    agreement.md                   classes, and the most frequent confusions
agreement/summary.json             what `cliper report` shows (report/agreements.py)

Counts are integers per image and are added, so a result does not depend on shards, workers or order.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cliper.pipeline.errors import EvaluationError
from cliper.pipeline.evaluate.counts import counts_file, write_counts
from cliper.pipeline.evaluate.evaluation import count_shards, counted_shards, read_counts_file
from cliper.pipeline.evaluate.metrics import Ints, confusion_totals, image_confusion, image_totals, ratio
from cliper.pipeline.evaluate.results import percent
from cliper.pipeline.parallel import Workers
from cliper.pipeline.report.agreements import add_summary
from cliper.pipeline.run.folder import Run, class_names
from cliper.pipeline.run.masks import unpack_mask
from cliper.pipeline.run.reader import open_shard
from cliper.pipeline.storage.sealed import sealed_table
from cliper.pipeline.storage.uris import join

CONFUSIONS = 12  # listed in agreement.md
LEAST = 5  # classes, and images, that agree least, in the report


def _field(name: str, kind: pa.DataType, meaning: str) -> pa.Field:
    return pa.field(name, kind, nullable=False, metadata={"meaning": meaning})


AGREEMENT = pa.schema(
    [
        _field("image_id", pa.string(), "as in the runs"),
        _field("pair", pa.int32(), "number of the pair of runs, in agreement.json"),
        _field("compared", pa.bool_(), "both runs have a mask"),
        _field("cells", pa.list_(pa.int64()), "non-zero cells of [K + 1, K + 2]: first * (K + 2) + second"),
        _field("counts", pa.list_(pa.int64()), "pixels in each of them"),
        _field("iou", pa.float64(), "mean IoU over the classes of either mask; 0 if not compared"),
    ]
)
IMAGES = pa.schema(
    [
        _field("image_id", pa.string(), "as in the runs"),
        _field("agreement", pa.float64(), "mean IoU over classes, then over the pairs of runs; 0 to 1"),
    ]
)


@dataclass(frozen=True)
class Agreement:
    """An opened agreement folder: the first run's, of two or more runs."""

    runs: tuple[Run, ...]
    folder: str

    @property
    def names(self) -> tuple[str, ...]:
        """The classes of all runs, without background."""
        return class_names(self.runs[0].identity)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Numbers of the runs of every pair."""
        return list(itertools.combinations(range(len(self.runs)), 2))

    def uncounted_shards(self) -> list[int]:
        """Shards that every run has and that are not counted, in order."""
        done = set.intersection(*({*run.done_shards()} for run in self.runs))
        return sorted(done - counted_shards(self.runs[0].storage, self.folder))

    def stage(self, block: pa.Table) -> pa.Table:
        """Count the shards named in column `shard`; adds `counted` (images) and `problem` (null if none)."""
        return write_counts(block, self.count_shard, self.runs[0].storage, self.folder, len(self.pairs))

    def count_shard(self, shard: int) -> pa.Table:
        """Compare the masks of a shard, pair by pair: a table of AGREEMENT. Raises EvaluationError or RunError."""
        rows = [self._rows(run, shard) for run in self.runs]
        for run, found in zip(self.runs[1:], rows[1:], strict=True):
            other = found.keys() ^ rows[0].keys()
            if other:
                raise EvaluationError(
                    f"shard {shard} of {self.runs[0].uri} and of {run.uri} holds different images, e.g. "
                    f"'{min(other)}'; label the same input with the same --shard-images"
                )
        counted = [
            self._compare(image_id, number, rows[a][image_id], rows[b][image_id])
            for image_id in rows[0]
            for number, (a, b) in enumerate(self.pairs)
        ]
        return pa.Table.from_pylist(counted, AGREEMENT)

    def _rows(self, run: Run, shard: int) -> dict[str, dict[str, Any]]:
        with open_shard(run, shard) as file:
            rows = file.read(["image_id", "mask", "mask_codec", "status"]).to_pylist()
        return {row["image_id"]: row for row in rows}

    def _compare(self, image_id: str, pair: int, a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
        content: dict[str, Any] = {"image_id": image_id, "pair": pair}
        if not a["status"] == b["status"] == "ok":
            return content | {"compared": False, "cells": [], "counts": [], "iou": 0.0}
        first, second = unpack_mask(a), unpack_mask(b)
        if first.shape != second.shape:
            raise EvaluationError(f"the masks of '{image_id}' differ in size: the runs are not of the same images")
        found = image_confusion(first, second, len(self.names), ())
        agree, mine, theirs = image_totals(found, len(self.names))
        iou = float(np.nanmean(ratio(agree, mine + theirs - agree)))
        return content | {"compared": True, "cells": found.cells, "counts": found.counts, "iou": iou}


def open_agreement(runs: Sequence[Run]) -> Agreement:
    """Create the folder of these runs in the first one, or continue it.

    Raises EvaluationError for fewer than two runs, a run given twice, or different classes.
    """
    if len(runs) < 2:
        raise EvaluationError("agreement needs two runs or more; e.g. cliper agree runs/a runs/b")
    uris = [run.uri for run in runs]
    twice = [uri for uri in uris if uris.count(uri) > 1]
    if twice:
        raise EvaluationError(f"{twice[0]} is given twice; name different runs")
    names = class_names(runs[0].identity)
    for run in runs[1:]:
        if class_names(run.identity) != names:
            raise EvaluationError(f"{runs[0].uri} and {run.uri} have different classes; masks of one list compare")
    content = {"runs": uris, "fingerprints": [run.fingerprint for run in runs], "class_names": list(names)}
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]
    folder = join(runs[0].uri, "agreement", digest)
    if not runs[0].storage.exists(join(folder, "agreement.json")):
        runs[0].storage.write_json(join(folder, "agreement.json"), content, indent=1)
    return Agreement(tuple(runs), folder)


def count_agreement(agreement: Agreement, workers: Workers = 1) -> Iterator[dict[str, Any]]:
    """Count the pending shards; yields {shard, counted} after each commit. Raises EvaluationError."""
    yield from count_shards(agreement.stage, agreement.uncounted_shards(), workers)


@dataclass(frozen=True)
class Agreed:
    """The sum over all counted shards."""

    images: pa.Table  # of IMAGES, the least agreement first; images that some run has no mask of are left out
    confusions: tuple[Ints, ...]  # of every pair: int64 [K + 1, K + 1], rows are the first run's labels
    left_out: int  # images without a mask in some run


def read_agreement(agreement: Agreement) -> Agreed:
    """Add up the counts."""
    storage, size = agreement.runs[0].storage, len(agreement.names) + 1
    tables = [AGREEMENT.empty_table()]
    for shard in sorted(counted_shards(storage, agreement.folder)):
        tables.append(read_counts_file(storage, join(agreement.folder, counts_file(shard)), AGREEMENT))
    table = pa.concat_tables(tables)
    confusions = []
    for number in range(len(agreement.pairs)):
        part = table.filter(pc.equal(table["pair"], number)).combine_chunks()
        flat = np.zeros(size * (size + 1), np.int64)
        if len(part):
            cells, counts = (pc.list_flatten(part[name]).to_numpy() for name in ("cells", "counts"))
            np.add.at(flat, cells, counts)
        confusions.append(flat.reshape(size, size + 1)[:, :size])
    grouped = table.group_by("image_id").aggregate([("iou", "mean"), ("compared", "all")])
    whole = grouped.filter(grouped["compared_all"])
    ranked = whole.sort_by([("iou_mean", "ascending"), ("image_id", "ascending")])
    columns = {"image_id": ranked["image_id"], "agreement": ranked["iou_mean"]}
    images = pa.table(columns, schema=IMAGES)
    return Agreed(images, tuple(confusions), len(grouped) - len(whole))


def write_agreement(agreement: Agreement, found: Agreed) -> str:
    """Write images.parquet, agreement.md and the summary for the report; returns the text of agreement.md."""
    storage, text = agreement.runs[0].storage, _page(agreement, found)
    add_summary(agreement.runs[0], agreement.folder.rpartition("/")[2], _summary(agreement, found))
    storage.write(join(agreement.folder, "images.parquet"), sealed_table(found.images, compression="zstd"))
    storage.write(join(agreement.folder, "agreement.md"), text.encode())
    return text


def image_agreement(run: Run, folder: str) -> dict[str, float]:
    """The agreement of every image in images.parquet of an agreement folder. Raises EvaluationError."""
    file = join(folder, "images.parquet")
    if not run.storage.exists(file):
        raise EvaluationError(f"{file} does not exist; name a folder that 'cliper agree' printed")
    table = read_counts_file(run.storage, file, IMAGES)
    return dict(zip(table["image_id"].to_pylist(), table["agreement"].to_pylist(), strict=True))


def _page(agreement: Agreement, found: Agreed) -> str:
    mean = _mean(found)
    lines = ["# Agreement of runs", ""]
    lines += [f"{number}: {run.uri}" for number, run in enumerate(agreement.runs)]
    left = f"; {found.left_out} without a mask in some run are left out" if found.left_out else ""
    lines += ["", f"{len(found.images)} images, mean IoU between runs {percent(mean)}{left}", ""]
    names = ["background", *agreement.names]
    for pair, confusion in zip(agreement.pairs, found.confusions, strict=True):
        lines += _pair_lines(pair, confusion, names)
    return "\n".join(lines) + "\n"


def _mean(found: Agreed) -> float:
    return float(np.mean(found.images["agreement"].to_numpy())) if len(found.images) else float("nan")


def _summary(agreement: Agreement, found: Agreed) -> dict[str, Any]:
    """The other runs, the mean IoU, and the classes and images that agree least; plain values."""
    names, values = ["background", *agreement.names], []
    for confusion in found.confusions:
        agree, mine, theirs = confusion_totals(np.pad(confusion, ((0, 0), (0, 1))))
        values.append(ratio(agree, mine + theirs - agree))
    known = [(name, [v for v in ious if not np.isnan(v)]) for name, *ious in zip(names, *values, strict=True)]
    classes = sorted((float(np.mean(ious)), name) for name, ious in known if ious)[:LEAST]
    images = found.images.slice(0, LEAST).to_pylist()
    return {
        "runs": [run.uri for run in agreement.runs[1:]],
        "images": len(found.images),
        "iou": None if np.isnan(_mean(found)) else _mean(found),
        "classes": [{"name": name, "iou": iou} for iou, name in classes],
        "least": [{"name": row["image_id"], "iou": row["agreement"]} for row in images],
    }


def _pair_lines(pair: tuple[int, int], confusion: Ints, names: Sequence[str]) -> list[str]:
    """IoU of every class that occurs, and the largest cells off the diagonal."""
    agree, mine, theirs = confusion_totals(np.pad(confusion, ((0, 0), (0, 1))))
    iou = ratio(agree, mine + theirs - agree)
    lines = [f"## {pair[0]} and {pair[1]}", "", "| class | IoU |", "|---|---|"]
    known = [(name, float(value)) for name, value in zip(names, iou, strict=True) if not np.isnan(value)]
    lines += [f"| {name} | {percent(value)} |" for name, value in known]
    off = confusion.copy()
    np.fill_diagonal(off, 0)
    order = [cell for cell in np.argsort(-off, axis=None, kind="stable")[:CONFUSIONS] if off.flat[cell] > 0]
    lines += ["", f"| {pair[0]} | {pair[1]} | share of all pixels |", "|---|---|---|"]
    total = max(int(confusion.sum()), 1)
    for cell in order:
        first, second = divmod(int(cell), len(names))
        lines.append(f"| {names[first]} | {names[second]} | {percent(int(off.flat[cell]) / total)} |")
    return [*lines, ""]
