"""Compare a run with the images it was made from: is each still the one that was labeled?

Each image is read as for labeling, with the same checks of size, ETag, tar header and id (corpus/load.py); the
pixels of its header are compared with its row. Images whose row says that they failed are skipped.
"""

import io
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from cliper.pipeline.corpus.load import load_entries
from cliper.pipeline.corpus.manifest import Manifest
from cliper.pipeline.corpus.sources import Entry
from cliper.pipeline.corpus.sources.entry import MTIME
from cliper.pipeline.run.changed import read_changed
from cliper.pipeline.run.failed import stored_settings
from cliper.pipeline.run.folder import Run
from cliper.pipeline.run.reader import labeled_shards, open_shard

SAMPLE = 1000  # images
SAMPLED_SHARDS = 50
AT_ONCE = 64  # images read together
_PLAIN = ("JPEG", "PNG", "WEBP", "BMP", "GIF")  # whose header has the size of what is labeled

Row = dict[str, Any]


@dataclass
class SourceReport:
    """Images by finding, an error_type of the loading stage; `touched` is no problem."""

    checked: int = 0
    touched: int = 0  # the same size, another modification time
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)  # of every finding: an id and the reason

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not self.counts.total()

    def lines(self) -> list[str]:
        """A line for the number of images, and one per kind of finding."""
        lines = [f"source    {self.checked} images compared, {self.counts.total()} of them differ"]
        for kind, count in self.counts.most_common():
            lines.append(f"  {kind}: {count}, for example {self.examples[kind]}")
        if self.touched:
            lines.append(f"  another modification time, else the same: {self.touched}")
        return lines


def check_source(run: Run, sample: bool, seed: int = 0) -> SourceReport:
    """Compare SAMPLE random images of up to SAMPLED_SHARDS shards, or all, with their source.

    Raises StorageError if the source's store refuses access, RunError for a damaged label or manifest file.
    """
    report = SourceReport()
    column = stored_settings(run)[0].input.image_column
    for shard, entries, rows in _labeled(run, run.manifest(), sample, seed):
        for start in range(0, len(entries), AT_ONCE):
            some = entries[start : start + AT_ONCE]
            loaded = load_entries(run.storage, shard, some, column).to_pylist()
            for entry, found in zip(some, loaded, strict=True):
                _compare(report, entry, rows[entry.image_id], found)
    return report


def _labeled(
    run: Run, manifest: Manifest, sample: bool, seed: int
) -> Iterator[tuple[int, list[Entry], dict[str, Row]]]:
    """Shards with the entries to compare, as they were labeled, and the rows by id."""
    shards, chance = labeled_shards(run), random.Random(seed)
    if sample and len(shards) > SAMPLED_SHARDS:
        shards = sorted(chance.sample(shards, SAMPLED_SHARDS))
    each = -(-SAMPLE // max(1, len(shards)))
    for shard in shards:
        with open_shard(run, shard) as file:
            table = file.read(["image_id", "status", "width", "height"])
        rows = {row["image_id"]: row for row in table.to_pylist() if row["status"] == "ok"}
        waiting = read_changed(run, shard)
        entries = [
            entry
            for entry in manifest.read_shard(run.storage, run.uri, shard)
            if entry.image_id in rows and entry.image_id not in waiting
        ]
        if sample and len(entries) > each:
            entries = chance.sample(entries, each)
        yield shard, entries, rows


def _compare(report: SourceReport, entry: Entry, row: Row, found: Row) -> None:
    report.checked += 1
    kind, reason = found["error_type"], found["error_message"]
    size = None if kind else _pixels(found["data"])
    if size is not None and size != (row["width"], row["height"]):
        kind, reason = "changed", f"{size[0]} x {size[1]} pixels; {row['width']} x {row['height']} were labeled"
    if kind is not None:
        report.counts[kind] += 1
        report.examples.setdefault(kind, f"{entry.image_id} ({reason})")
    elif entry.stamp is not None and entry.stamp.startswith(MTIME):
        report.touched += f"{MTIME}{Path(entry.uri).stat().st_mtime_ns}" != entry.stamp


def _pixels(data: bytes) -> tuple[int, int] | None:
    """Width and height in a file's header; None if it is not a simple one."""
    try:
        with Image.open(io.BytesIO(data), formats=_PLAIN) as image:
            return image.size
    except Exception:  # decoders raise nearly any type; the bytes are as they were labeled
        return None
