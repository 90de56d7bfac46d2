"""Images per second and core of every export format, compared with only reading the run.

    python -m benchmarks.export [--output FOLDER]

Two synthetic runs: 1,000 small masks (160 x 160, as of scenes) and 200 larger ones (1024 x 768), one process,
local disk, images not copied. The first line is the upper bound for formats that need the labels: rows are read
and masks decoded, but nothing is written.
"""

import argparse
import resource
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from cliper.model.classes import ClassList
from cliper.pipeline.config import JobConfig
from cliper.pipeline.export.base import Item, Plan
from cliper.pipeline.export.driver import export
from cliper.pipeline.export.items import read_items
from cliper.pipeline.export.options import Options
from cliper.pipeline.export.registry import EXPORTERS
from cliper.pipeline.run.corrections import NO_CORRECTIONS
from cliper.pipeline.run.folder import Run, begin_run, class_names, identity_of
from cliper.pipeline.run.masks import pack_mask
from cliper.pipeline.run.rows import RowFilter
from cliper.pipeline.run.schema import label_schema
from cliper.pipeline.run.shards import write_shard
from cliper.pipeline.storage.backend import Storage
from tools.scenes import CLASSES, make_scenes

SHARD = 100


@dataclass(frozen=True)
class Size:
    """One of the two runs."""

    name: str
    images: int
    width: int
    height: int


SIZES = (Size("160 x 160", 1000, 160, 160), Size("1024 x 768", 200, 1024, 768))


def make_run(folder: Path, size: Size) -> Run:
    """A run whose masks are scenes, enlarged by nearest neighbour; 100 different ones, repeated."""
    classes = ClassList.parse(list(CLASSES))
    config = JobConfig.model_validate({})
    run = begin_run(str(folder), Storage(), identity_of(config, classes, "made", {}))
    schema = label_schema(classes.names, run.fingerprint, config.mask_codec, "made")
    masks = [_enlarged(scene.labels, size) for scene in make_scenes(3, range(SHARD), 160)]
    for shard in range(size.images // SHARD):
        rows = [_row(run, shard * SHARD + i, labels) for i, labels in enumerate(masks)]
        table = pa.Table.from_pylist(rows, schema).append_column("shard", pa.array([shard] * SHARD, pa.int32()))
        write_shard(table, run.storage, run.uri, schema)
    return run


def _enlarged(labels: np.ndarray, size: Size) -> np.ndarray:
    return np.array(Image.fromarray(labels).resize((size.width, size.height), Image.Resampling.NEAREST))


def _row(run: Run, number: int, labels: np.ndarray) -> dict[str, object]:
    height, width = labels.shape
    found = np.unique(labels).tolist()
    names = class_names(run.identity)
    classes = [
        {"class_id": k, "name": names[k - 1], "pixels": 1, "presence": 1.0, "mean_confidence": 1.0} for k in found
    ]
    known = {"image_id": f"scenes/{number:06d}.jpg", "uri": f"/nowhere/{number:06d}.jpg"}
    size = {"width": width, "height": height, "orientation": 1, "confidence": 0.5, "margin": 0.5}
    end = {"status": "ok", "attempts": 1, "run_fingerprint": run.fingerprint}
    return known | size | pack_mask(labels, "png") | {"classes": classes} | end


def plan_of(run: Run, name: str) -> Plan:
    """A plan for all rows that copies no images."""
    options = Options(val_share=0.1)
    return Plan(name, run.uri, run.fingerprint, class_names(run.identity), RowFilter(), False, options)


def read_only(run: Run) -> float:
    """CPU seconds to read every row and decode its mask."""
    started = time.process_time()
    for shard in sorted(run.done_shards()):
        for item in read_items(run, shard, plan_of(run, "coco"), EXPORTERS["coco"], NO_CORRECTIONS):
            assert isinstance(item, Item)
            assert item.labels.size
    return time.process_time() - started


def write(run: Run, name: str, folder: Path) -> float:
    """CPU seconds of one export, summed over all threads."""
    started = time.process_time()
    export(run, plan_of(run, name), str(folder))
    return time.process_time() - started


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table: format, images per second of processor time for both sizes, bytes per image."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="keep the exports here; default: a temporary folder")
    kept = parser.parse_args(arguments).output
    root = kept or Path(tempfile.mkdtemp())
    runs = {size: make_run(root / f"run-{size.width}", size) for size in SIZES}
    print("| format | " + " | ".join(f"{size.name}: images/s/core | KB/image" for size in SIZES) + " |")
    print("|---|" + "---:|" * 2 * len(SIZES))
    print(
        "| read and decode only | "
        + " | ".join(f"{size.images / read_only(run):.0f} |" for size, run in runs.items())
        + " |"
    )
    for name in EXPORTERS:
        cells = []
        for size, run in runs.items():
            folder = root / f"{name}-{size.width}"
            seconds = write(run, name, folder)
            written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            cells.append(f"{size.images / seconds:.0f} | {written / size.images / 1000:.1f}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")
    if kept is None:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
