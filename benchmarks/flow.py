"""Throughput of the flow compared with a plain loop, time to plan a resume, and cost by corpus size.

    python -m benchmarks.flow

prints one JSON object. The segmenter sleeps or does almost nothing, so that only the overhead is measured.
"""

import argparse
import json
import resource
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import Stopwatch
from benchmarks.models import photo
from cliper.model.classes import ClassList
from cliper.model.config import CLIPerConfig
from cliper.model.segmentation import Segmentation
from cliper.pipeline.config import JobConfig, ShardConfig
from cliper.pipeline.corpus.decode import decode
from cliper.pipeline.corpus.manifest import read_manifest, write_manifest
from cliper.pipeline.corpus.sources import Entry, list_entries
from cliper.pipeline.flow import label_corpus
from cliper.pipeline.label.job import Job
from cliper.pipeline.label.pool import Pool
from cliper.pipeline.label.segmenters import SegmenterKind
from cliper.pipeline.label.stages import Task
from cliper.pipeline.run.folder import Run, begin_run
from cliper.pipeline.storage.backend import Storage

CLASSES = ClassList.parse(["dark", "middle", "bright"])
SECONDS_PER_IMAGE = 0.02
PHOTOS = 64  # different files; the corpus links to them


class Quick:
    """Labels by brightness."""

    seconds = 0.0

    def __init__(self, config: JobConfig, classes: ClassList) -> None:
        self.classes = len(classes)

    def segment(self, images: Sequence[np.ndarray], image_ids: Sequence[str]) -> list[Segmentation]:
        """Label uint8 [H, W, 3] by the red channel after the time a model would take."""
        time.sleep(self.seconds * len(images))
        return [self._one(image[..., 0] >> 6) for image in images]

    def _one(self, labels: np.ndarray) -> Segmentation:
        pixels = np.bincount(labels.ravel(), minlength=self.classes + 1)
        ones = np.ones(self.classes + 1, np.float32)
        return Segmentation(labels, ones[1:], pixels, ones, ones, ones, 1.0, 1.0, 1.0)


class Sleeping(Quick):
    """20 ms per image, like a model on a GPU."""

    seconds = SECONDS_PER_IMAGE


def write_corpus(folder: Path, images: int, size: tuple[int, int]) -> None:
    """Write `images` JPEG files, PHOTOS different ones, the rest links to them."""
    from PIL import Image

    folder.mkdir(parents=True)
    for i in range(images):
        path = folder / f"{i:06d}.jpg"
        if i < PHOTOS:
            Image.fromarray(photo(i, size)).save(path, quality=90)
        else:
            path.hardlink_to(folder / f"{i % PHOTOS:06d}.jpg")


def bare_loop(folder: Path, config: JobConfig) -> float:
    """Images per second of a plain loop that decodes and segments, without encoding or storage."""
    segmenter = Sleeping(config, CLASSES)
    files = sorted(folder.iterdir())
    start = time.perf_counter()
    for first in range(0, len(files), config.batch_size):
        batch = files[first : first + config.batch_size]
        pixels = [decode(path.read_bytes(), config.max_pixels).pixels for path in batch]
        segmenter.segment(pixels, [path.name for path in batch])
    return len(files) / (time.perf_counter() - start)


def make_job(folder: Path, output: Path, config: JobConfig, factory: type[Quick]) -> Job:
    """Begin a run that labels a folder with a segmenter of this file."""
    run, storage = begin_run(str(output), Storage(), {"bench": output.name}), Storage()
    manifest = write_manifest(list_entries(storage, str(folder), config.input), storage, run.uri, config.shard)
    kind = SegmenterKind(CLIPerConfig, factory, lambda config: {}, lambda config: "benchmark")
    return Job(run, manifest, config, CLASSES, kind, "benchmark")


def run_flow(folder: Path, output: Path, config: JobConfig, factory: type[Quick], actors: int) -> dict[str, float]:
    """Label a folder and return images/s over the whole call, and from the first to the last committed shard."""
    job = make_job(folder, output, config, factory)
    start, commits = time.perf_counter(), []
    tasks = [Task(shard) for shard in job.run.pending_shards(job.manifest)]
    for summary in label_corpus(job, tasks, Pool(actors, 0.5, 0)):
        commits.append((time.perf_counter() - start, int(job.manifest.images_in([summary["shard"]]))))
    images = sum(count for _, count in commits)
    steady = (images - commits[0][1]) / max(commits[-1][0] - commits[0][0], 1e-9)
    shutil.rmtree(output)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"whole": images / commits[-1][0], "steady": steady, "seconds": commits[-1][0], "driver_bytes": peak}


def flow_rates(folder: Path, work: Path, images: int) -> dict[str, Any]:
    """Images/s of the plain loop, one actor and two, on photographs of 500 x 375."""
    write_corpus(folder, images, (375, 500))
    config = JobConfig(shard=ShardConfig(images=64))
    rates: dict[str, Any] = {"bare": bare_loop(folder, config), "ceiling": 1 / SECONDS_PER_IMAGE}
    for actors in (1, 2):
        rates[f"actors_{actors}"] = run_flow(folder, work / f"actors{actors}", config, Sleeping, actors)
    return rates


def cost_curve(work: Path, sizes: Iterable[int]) -> dict[str, Any]:
    """Images/s and the driver's peak memory for growing corpora of small images."""
    curve = {}
    for images in sizes:
        folder = work / f"corpus{images}"
        write_corpus(folder, images, (48, 64))
        curve[str(images)] = run_flow(folder, work / f"curve{images}", JobConfig(), Quick, 1)
        shutil.rmtree(folder)
    return curve


def resume_planning(work: Path, images: int) -> dict[str, float]:
    """Seconds and memory to write a manifest of `images` S3 keys, and to plan a run that is half done."""
    storage, watch = Storage(), Stopwatch()
    run = Run(str(work / "resume"), storage, {})
    with watch.stage("write"):
        write_manifest(_keys(images), storage, run.uri, ShardConfig())
    labels = work / "resume" / "labels"
    labels.mkdir(parents=True)
    manifest = read_manifest(storage, run.uri)
    for shard in range(0, manifest.shards if manifest else 0, 2):
        (labels / f"shard-{shard:06d}.parquet").touch()
    with watch.stage("plan"):
        manifest = read_manifest(storage, run.uri)
        todo = run.pending_shards(manifest) if manifest else []
    result = watch.result()
    return {
        "images": images,
        "pending_shards": len(todo),
        "write_seconds": result["write"]["seconds"],
        "write_bytes": result["write"]["bytes"],
        "plan_seconds": result["plan"]["seconds"],
        "plan_bytes": result["plan"]["bytes"],
    }


def _keys(images: int) -> Iterator[Entry]:
    for i in range(images):
        key = f"photos/{i // 1000:04d}/{i:09d}.jpg"
        yield Entry(image_id=key, uri=f"s3://bucket/{key}", bytes=120_000)


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--curve", type=int, nargs="*", default=[1000, 10_000, 100_000])
    args = parser.parse_args()
    import ray

    work = Path(tempfile.mkdtemp(prefix="bench-"))
    results: dict[str, Any] = {"resume": resume_planning(work, args.rows)}
    ray.init("local", num_cpus=4, include_dashboard=False, object_store_memory=500_000_000, logging_level="error")
    try:
        if args.images:
            results["flow"] = flow_rates(work / "photos", work, args.images)
        results["curve"] = cost_curve(work, args.curve)
    finally:
        ray.shutdown()
        shutil.rmtree(work)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
