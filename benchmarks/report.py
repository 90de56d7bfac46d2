"""Time and peak memory of `cliper report` on a synthetic run.

python -m benchmarks.report [--rows 100000] [--folder build/report]
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from cliper.model.classes import ClassList
from cliper.pipeline.config import JobConfig, ShardConfig, load_classes
from cliper.pipeline.corpus.manifest import write_manifest
from cliper.pipeline.corpus.sources import Entry
from cliper.pipeline.run.folder import Run, begin_run, identity_of
from cliper.pipeline.run.masks import pack_mask
from cliper.pipeline.run.schema import COLUMNS, label_schema
from cliper.pipeline.run.shards import write_shard
from cliper.pipeline.storage.backend import Storage

PICTURES = 64  # distinct photographs and masks; rows repeat them
WIDTH, HEIGHT = 640, 480
PER_IMAGE = 6  # classes in a mask
SHARD_IMAGES = 256


def make_run(folder: Path, rows: int, classes: ClassList, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Run:
    """A finished run of `rows` images of `size` (width, height), every hundredth failed."""
    rng = np.random.default_rng(0)
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    contents = [
        _content(_picture(pictures / f"{i:03d}.jpg", rng, len(classes), size), classes) for i in range(PICTURES)
    ]
    config, storage = JobConfig(shard=ShardConfig(images=SHARD_IMAGES)), Storage()
    run = begin_run(
        str(folder / "run"), storage, identity_of(config, classes, str(pictures), {"backbone": "none"})
    )
    entries = (Entry(f"{i:08d}.jpg", str(pictures / f"{i % PICTURES:03d}.jpg")) for i in range(rows))
    manifest = write_manifest(entries, storage, run.uri, config.shard)
    schema = label_schema(classes.names, run.fingerprint, config.mask_codec, "synthetic")
    for shard in range(manifest.shards):
        listed = manifest.read_shard(storage, run.uri, shard)
        labeled = [_row(entry, contents[int(entry.image_id[:8]) % PICTURES], rng, run) for entry in listed]
        table = pa.Table.from_pylist(labeled, COLUMNS)
        shards = pa.array(np.full(len(table), shard), pa.int32())
        write_shard(table.add_column(0, "shard", shards), storage, run.uri, schema)
    return run


def _picture(path: Path, rng: np.random.Generator, classes: int, size: tuple[int, int]) -> np.ndarray:
    """Write a smooth photograph of `size`, and return a mask of curved regions: uint8 [height, width]."""
    colours = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    colours.resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
    planes = rng.random((PER_IMAGE, 6, 8)).astype(np.float32)
    wide = [Image.fromarray(plane).resize(size, Image.Resampling.BICUBIC) for plane in planes]
    labels = rng.choice(np.arange(1, classes + 1), PER_IMAGE, replace=False).astype(np.uint8)
    return labels[np.stack([np.asarray(plane) for plane in wide]).argmax(axis=0)]


def _content(mask: np.ndarray, classes: ClassList) -> dict[str, Any]:
    """The columns of a row that every copy of a picture shares."""
    labels, pixels = np.unique(mask, return_counts=True)
    entries = [
        {"class_id": label, "name": classes.names[label - 1], "pixels": count}
        for label, count in zip(labels.tolist(), pixels.tolist(), strict=True)
    ]
    size = {"width": mask.shape[1], "height": mask.shape[0], "orientation": 1}
    return size | pack_mask(mask, "png") | {"classes": entries, "status": "ok"}


def _row(entry: Entry, content: dict[str, Any], rng: np.random.Generator, run: Run) -> dict[str, Any]:
    base = {"image_id": entry.image_id, "uri": entry.uri, "attempts": 1, "run_fingerprint": run.fingerprint}
    if int(entry.image_id[:8]) % 100 == 99:
        failure = {"error_type": "corrupt", "error_message": "OSError: image file is truncated", "stage": "decode"}
        return base | {"status": "failed"} | failure
    values = rng.random((len(content["classes"]) + 1, 4)).tolist()
    names = ("presence", "mean_confidence", "p10_confidence", "margin")
    classes = [
        entry | dict(zip(names, given, strict=True))
        for entry, given in zip(content["classes"], values[1:], strict=True)
    ]
    confidence = dict(zip(("confidence", "confidence_p10", "margin"), values[0][:3], strict=True))
    return base | content | {"classes": classes} | confidence


def measure(run_uri: str, *options: str) -> dict[str, Any]:
    """Seconds and peak bytes of the command in its own process, and the size of the page."""
    page = Path(run_uri).parent / "report.html"
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "cliper.jobs.cli", "report", run_uri, "--output", str(page), *options], check=True
    )
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_mb": round(used.ru_maxrss / 1024),
        "page_mb": round(page.stat().st_size / 1e6, 1),
    }


def main() -> None:
    """Create the run if it does not exist, and print the measurement as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, default=Path("build/report"))
    arguments = parser.parse_args()
    if not (arguments.folder / "run").is_dir():
        start = time.perf_counter()
        make_run(arguments.folder, arguments.rows, load_classes("coco_stuff"))
        print(f"made {arguments.rows} rows in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    print(json.dumps({"rows": arguments.rows} | measure(str(arguments.folder / "run"))))


if __name__ == "__main__":
    main()
