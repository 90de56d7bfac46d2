"""The same job by this project and by others: read, decode, segment (20 ms an image), encode, write Parquet.

    python -m benchmarks.peers [--images 2000] [--only ours]

One segmenting worker each, on photographs made from examples/photos. Every engine runs in a separate process.
"whole" is images over seconds from the start of the process, start-up included; "steady" counts the images between
a tenth and nine tenths of the job. Daft runs if it is installed (it is no dependency). Prints a Markdown table.
"""

import argparse
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.flow import CLASSES, Sleeping

BATCH = 16
TIMES = "PEERS_TIMES"  # environment: the file to which the segmenter adds the time of each image
SIZE = 500, 375


class Timed(Sleeping):
    """20 ms per image; notes the time of each."""

    def segment(self, images: Sequence[np.ndarray], image_ids: Sequence[str]) -> Any:
        """See Sleeping."""
        found = super().segment(images, image_ids)
        with Path(os.environ[TIMES]).open("a") as file:
            file.write(f"{time.time()}\n" * len(images))
        return found


def masks(names: Sequence[str], contents: Sequence[bytes], segmenter: Timed) -> list[bytes]:
    """Decode, segment and encode a batch: PNG files."""
    images = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in contents]
    return [_png(found.labels) for found in segmenter.segment(images, names)]


def _png(labels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(labels).save(buffer, format="PNG")
    return buffer.getvalue()


def ours(folder: Path, output: Path) -> None:
    """List, label with one actor, one Parquet file per shard."""
    from benchmarks.flow import run_flow
    from cliper.jobs.session import ray_session
    from cliper.pipeline.config import JobConfig

    with ray_session(verbose=False) as session:
        session.connect()
        run_flow(folder, output, JobConfig(), Timed, actors=1)


def naive_ray(folder: Path, output: Path) -> None:
    """Ray Data as its guide shows it."""
    import ray

    class Segment:
        def __init__(self) -> None:
            self.segmenter = Timed(None, CLASSES)  # type: ignore[arg-type]

        def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
            found = self.segmenter.segment(list(batch["image"]), list(batch["path"]))
            return {"path": batch["path"], "mask": [_png(one.labels) for one in found]}

    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    images = ray.data.read_images(str(folder), include_paths=True, mode="RGB")
    images.map_batches(Segment, batch_size=BATCH, concurrency=1).write_parquet(str(output))


def loader(folder: Path, output: Path) -> None:
    """A torch DataLoader that reads and decodes in one worker, and a loop."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from torch.utils.data import DataLoader

    output.mkdir()
    paths, segmenter = sorted(folder.iterdir()), Timed(None, CLASSES)  # type: ignore[arg-type]
    rows: list[dict[str, Any]] = []
    batches: Any = DataLoader(paths, BATCH, collate_fn=_decoded, num_workers=1)  # type: ignore[arg-type]
    for number, (names, images) in enumerate(batches, 1):
        found = segmenter.segment(images, names)
        rows += [{"path": name, "mask": _png(one.labels)} for name, one in zip(names, found, strict=True)]
        if number % 16 == 0 or number == len(batches):
            pq.write_table(pa.Table.from_pylist(rows), output / f"{number:06d}.parquet")
            rows = []


def _decoded(paths: Sequence[Path]) -> tuple[list[str], list[np.ndarray]]:
    return [path.name for path in paths], [np.asarray(Image.open(path).convert("RGB")) for path in paths]


def daft_flow(folder: Path, output: Path) -> None:
    """Daft's native runner with a batched user function."""
    import daft

    segmenter = Timed(None, CLASSES)  # type: ignore[arg-type]

    @daft.udf(return_dtype=daft.DataType.binary(), batch_size=BATCH, concurrency=1)  # type: ignore[untyped-decorator]
    def segment(paths: Any, contents: Any) -> list[bytes]:
        return masks(paths.to_pylist(), contents.to_pylist(), segmenter)

    frame = daft.from_glob_path(f"{folder}/*.jpg")
    frame = frame.with_column("data", frame["path"].download())
    frame = frame.with_column("mask", segment(frame["path"], frame["data"]))
    frame.select("path", "mask").write_parquet(str(output))


ENGINES: dict[str, Callable[[Path, Path], None]] = {
    "ours": ours,
    "Ray Data, naive": naive_ray,
    "torch DataLoader loop": loader,
    "Daft": daft_flow,
}


def main() -> None:
    """Measure every engine and print a Markdown table; with --engine, run one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--only", default="", help="engines whose name contains this")
    parser.add_argument("--engine", nargs=3, metavar=("NAME", "FOLDER", "OUTPUT"), help="run this one, here")
    arguments = parser.parse_args()
    if arguments.engine:
        name, folder, output = arguments.engine
        ENGINES[name](Path(folder), Path(output))
        return
    print(
        "| engine | whole, images/s | steady, images/s | seconds | to the first image |\n|---|---:|---:|---:|---:|"
    )
    with tempfile.TemporaryDirectory() as root:
        photographs(Path(root) / "photos", arguments.images)
        for name in ENGINES:
            if arguments.only in name:
                print(f"| {name} | {' | '.join(_cells(name, Path(root), arguments.images))} |", flush=True)


def photographs(folder: Path, images: int) -> None:
    """`images` JPEG files of SIZE, from examples/photos, each a separate file."""
    folder.mkdir()
    sources = sorted(Path("examples/photos").glob("*.jpg"))
    contents = [_jpeg(Image.open(path)) for path in sources]
    for i in range(images):
        (folder / f"{i:06d}.jpg").write_bytes(contents[i % len(contents)])


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").resize(SIZE).save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


def _cells(name: str, root: Path, images: int) -> Iterator[str]:
    """Run one engine in another process; its rates, or why there are none."""
    times, output = root / f"{name}.times", root / f"{name}.out"
    command = [sys.executable, "-m", "benchmarks.peers", "--engine", name, str(root / "photos"), str(output)]
    start = time.time()
    done = subprocess.run(
        command, env=os.environ | {TIMES: str(times)}, capture_output=True, text=True, check=False
    )
    seconds = time.time() - start
    if done.returncode:
        yield (done.stderr.strip().splitlines() or ["failed"])[-1][:100]
        return
    found = sorted(float(line) for line in times.read_text().splitlines())
    assert len(found) == images, f"{name} segmented {len(found)} of {images} images"
    low, high = found[images // 10], found[images * 9 // 10]
    yield f"{images / seconds:.1f}"
    yield f"{(images * 9 // 10 - images // 10) / (high - low):.1f}"
    yield f"{seconds:.1f}"
    yield f"{found[0] - start:.1f} s"


if __name__ == "__main__":
    main()
