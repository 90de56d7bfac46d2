"""How many of the classes in the ground truth a segmenter considered, for those that record `proposed`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from cliper.pipeline.evaluate.counts import Counts, ShardCounter
from cliper.pipeline.run.rows import read_tables


def proposals(counter: ShardCounter, counts: Counts) -> dict[str, Any] | None:
    """Recall of the proposals of a run; None for a segmenter that proposes nothing.

    `recall`: share of the classes in the truth, image by image and without background, that were proposed; null
    if there are none. `mean`: classes proposed for an image.
    """
    if counter.run.identity.get("segmenter", "cliper") == "cliper":
        return None
    proposed: dict[str, list[int]] = {}
    for table in read_tables(counter.run, ("image_id", "proposed")):
        for row in table.drop_null().to_pylist():
            if (name := counter.benchmark_id(row["image_id"])) is not None:
                proposed[name] = row["proposed"]
    return _summary(proposed, counts) if proposed else None


def _summary(proposed: Mapping[str, list[int]], counts: Counts) -> dict[str, Any]:
    found = total = 0
    for image_id, totals in zip(counts.image_ids, counts.totals, strict=True):
        present = set(np.flatnonzero(totals[1])) - {0}
        total += len(present)
        found += len(present & set(proposed.get(image_id, ())))
    mean = sum(map(len, proposed.values())) / len(proposed)
    return {"recall": found / total if total else None, "mean": mean}
