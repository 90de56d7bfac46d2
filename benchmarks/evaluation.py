"""Evaluation without a model: counting stored masks, and merging the counts of a whole benchmark.

    OMP_NUM_THREADS=1 python -m benchmarks.evaluation

Prints images per second of counting at VOC size (500 x 375, PNG masks and ground truth on disk), and time and
peak memory of merging 5,000 images x 171 classes and 2,000 x 150, each in a separate process.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cliper.pipeline.evaluate.counts import COUNTS, ShardCounter, counts_file, merge
from cliper.pipeline.evaluate.evaluation import read_counts
from cliper.pipeline.run.folder import Run
from cliper.pipeline.run.masks import decode_png, encode_png
from cliper.pipeline.storage.backend import Storage
from tools.scenes import CLASSES, SEEDS, make_scene

COUNTED = 256
SHARD = 256
NO_RUN = Run("", Storage(), {})  # single images are counted, not those of a run


def count_speed(folder: Path) -> float:
    """Images per second of comparing stored masks with ground truth on this core."""
    counter = ShardCounter(NO_RUN, str(folder), "", Storage(), {}, len(CLASSES), (255,), False)
    pairs = [_voc_size_pair(index) for index in range(64)]
    for index, (truth, _) in enumerate(pairs):
        (folder / f"{index}.png").write_bytes(encode_png(truth))
    masks = [encode_png(prediction) for _, prediction in pairs]
    start = time.perf_counter()
    for index in range(COUNTED):
        truth = decode_png((folder / f"{index % 64}.png").read_bytes())
        counter.count_image(truth, decode_png(masks[index % 64]))
    return COUNTED / (time.perf_counter() - start)


def _voc_size_pair(index: int) -> tuple[np.ndarray, np.ndarray]:
    """Ground truth and a shifted prediction of one scene, uint8 [375, 500]."""
    labels = make_scene(SEEDS["test"], index, 512).labels
    return labels[60:435, 6:506].copy(), np.roll(labels, (5, -7), (0, 1))[60:435, 6:506].copy()


def write_counts(folder: Path, images: int, classes: int) -> None:
    """Counts of random maps with about 8 classes an image, 640 x 480, as an evaluation leaves them."""
    generator = np.random.default_rng(0)
    counter = ShardCounter(NO_RUN, "", "", Storage(), {}, classes, (0, 255), False)
    rows = []
    for index in range(images):
        here = generator.choice(classes, 8) + 1
        truth = np.kron(generator.choice(here, (12, 16)), np.ones((40, 40))).astype(np.uint8)
        noise = np.kron(generator.choice(here, (24, 32)), np.ones((20, 20)))
        keep = np.kron(generator.random((24, 32)) < 0.6, np.ones((20, 20), dtype=bool))
        prediction = np.where(keep, truth, noise).astype(np.uint8)
        rows.append({"image_id": f"{index:06d}", "failed": False} | counter.count_image(truth, prediction))
    for shard, start in enumerate(range(0, images, SHARD)):
        target = folder / counts_file(shard)
        target.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows[start : start + SHARD], COUNTS), target, compression="zstd")


def peak_memory() -> float:
    """Peak memory of this process in MiB. (The kernel's ru_maxrss would include the parent process.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def merge_once(folder: str, classes: int) -> str:
    """Time and peak memory of reading and merging the output of `write_counts`."""
    before = peak_memory()
    start = time.perf_counter()
    table = read_counts(Storage(), folder)
    read = time.perf_counter()
    counts = merge(table, classes)
    merged = time.perf_counter()
    peak = peak_memory()
    return (
        f"merge {len(counts.image_ids)} x {classes}: read {read - start:.2f} s, merge {merged - read:.2f} s, "
        f"peak {peak:.0f} MiB ({before:.0f} before)"
    )


def main() -> None:
    """Run everything, or, with a folder and a class count as arguments, one merge."""
    if len(sys.argv) == 3:
        print(merge_once(sys.argv[1], int(sys.argv[2])))
        return
    with tempfile.TemporaryDirectory() as folder:
        print(f"counting: {count_speed(Path(folder)):.0f} images/s per core")
        for images, classes in ((5000, 171), (2000, 150)):
            target = Path(folder) / f"{images}"
            write_counts(target, images, classes)
            subprocess.run([sys.executable, "-m", "benchmarks.evaluation", str(target), str(classes)], check=True)


if __name__ == "__main__":
    main()
