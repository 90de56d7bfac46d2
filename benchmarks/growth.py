"""The cost of the checks around a run: per image, when a run of many shards continues, and when it is extended.

    python -m benchmarks.growth

prints one JSON object; times are processor time of one process. The segmenter does almost nothing.
"""

import argparse
import hashlib
import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from benchmarks.flow import CLASSES, Quick
from benchmarks.models import photo
from cliper.pipeline.config import JobConfig, ShardConfig
from cliper.pipeline.corpus.compare import Comparison, Known, new_entries
from cliper.pipeline.corpus.manifest import write_manifest
from cliper.pipeline.corpus.sources import Entry
from cliper.pipeline.label.results import refuse_wrong
from cliper.pipeline.run.changed import changed_shards
from cliper.pipeline.run.folder import Run, begin_run, class_table
from cliper.pipeline.run.masks import pack_mask
from cliper.pipeline.run.reader import torn_shards
from cliper.pipeline.run.schema import COLUMNS, label_schema
from cliper.pipeline.run.shards import encode, shard_file, write_shard
from cliper.pipeline.storage.backend import Storage
from cliper.pipeline.storage.sealed import check_seal

STORAGE = Storage()


def main() -> None:
    """Measure all three."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--images", type=int, default=200_000, help="of the corpus that is compared")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = {
            "per_image": per_image(),
            "resume": resume(Path(folder) / "resumed", given.shards),
            "extend": extend(Path(folder) / "extended", given.images),
        }
    print(json.dumps(results, indent=1))


def processor_seconds(work: Callable[[], Any]) -> float:
    """Processor time of one call, all threads together."""
    began = time.process_time()
    work()
    return time.process_time() - began


def per_image(repeats: int = 100) -> dict[str, float]:
    """Milliseconds of each check for a photograph of 500 x 375, and of decoding it and encoding its mask."""
    from cliper.pipeline.corpus.decode import decode

    buffer = io.BytesIO()
    Image.fromarray(photo(0, (375, 500))).save(buffer, format="JPEG", quality=90)
    data = buffer.getvalue()
    pixels = decode(data, 10**8).pixels
    [found] = Quick(JobConfig(), CLASSES).segment([pixels], ["a"])
    row = {"image_id": "a", "uri": "/a", "status": "ok", "attempts": 1, "run_fingerprint": "0" * 16}
    row |= pack_mask(found.labels, "png")
    rows = pa.Table.from_pylist([row] * 32, COLUMNS)
    schema = label_schema(CLASSES.names, "0" * 16, "png", "fake")
    sealed = encode(rows.cast(schema), 0)
    parts: dict[str, tuple[Callable[[], Any], int]] = {
        "decode": (lambda: decode(data, 10**8), 1),
        "encode_mask": (lambda: pack_mask(found.labels, "png"), 1),
        "write_shard_in_memory": (lambda: encode(rows.cast(schema), 0), 32),
        "check_etag_md5": (lambda: hashlib.md5(data, usedforsecurity=False).hexdigest(), 1),
        "check_result": (lambda: refuse_wrong(found, found.labels.shape, len(CLASSES)), 1),
        "check_seal": (lambda: check_seal(sealed), 32),
    }
    return {
        name: round(1000 * processor_seconds(lambda: [work() for _ in range(repeats)]) / repeats / images, 4)  # noqa: B023
        for name, (work, images) in parts.items()
    }


def resume(folder: Path, shards: int) -> dict[str, float]:
    """Seconds to plan what is left of a run with all its files there, without and with the checks of files."""
    run = _run(folder)
    entries = (Entry(str(i), f"/{i}.jpg", 10, stamp=f"mtime {i}") for i in range(shards))
    manifest = write_manifest(entries, STORAGE, run.uri, ShardConfig(images=1))
    schema = label_schema(CLASSES.names, run.fingerprint, "png", "fake")
    mask = pack_mask(np.zeros((64, 64), np.uint8), "png")
    for shard in range(shards):
        row = {"image_id": str(shard), "uri": f"/{shard}.jpg", "status": "ok", "attempts": 1}
        table = pa.Table.from_pylist([row | mask | {"run_fingerprint": run.fingerprint}], COLUMNS)
        if shard == 0:
            write_shard(table.add_column(0, "shard", pa.array([shard])), STORAGE, run.uri, schema)
        else:  # without an fsync each
            Path(run.uri, shard_file(shard)).write_bytes(encode(table.cast(schema), shard))
    wall = time.perf_counter()
    found = {
        "shards": shards,
        "names_only": processor_seconds(lambda: run.pending_shards(manifest)),
        "ends_of_files": processor_seconds(lambda: torn_shards(run, manifest)),
        "replaced_images": processor_seconds(lambda: changed_shards(run)),
    }
    return found | {"wall_of_all": time.perf_counter() - wall}


def extend(folder: Path, images: int) -> dict[str, float]:
    """Seconds to read the list and to compare a listing of the same size with it."""
    run = _run(folder)

    def listed() -> list[Entry]:
        return [Entry(f"part{i % 7}/{i:08d}.jpg", f"/data/{i}", i, stamp=f"mtime {i}") for i in range(images)]

    manifest = write_manifest(listed(), STORAGE, run.uri, ShardConfig(images=512))
    known: list[Known] = []
    read = processor_seconds(lambda: known.append(Known(STORAGE, run.uri, manifest)))
    listing, result = listed(), Comparison(images)
    compared = processor_seconds(lambda: list(new_entries(known[0], listing, result)))
    assert (result.new, result.differences, result.vanished) == (0, [], 0)
    held = sum(part.nbytes for part in (known[0].ids, known[0].facts, known[0].order, known[0].seen))
    return {"images": images, "read_list": read, "compare": compared, "bytes_per_image": held / images}


def _run(folder: Path) -> Run:
    identity = {"classes": class_table(CLASSES), "model": JobConfig().model_dump(mode="json")["model"]}
    return begin_run(str(folder), STORAGE, identity)


if __name__ == "__main__":
    main()
