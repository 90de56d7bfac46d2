"""Commands that read a run, with one process, four, and Ray on two logical nodes: seconds, and the same bytes.

    python -m benchmarks.readers [--rows 100000] [--folder build/readers] [--only coco]

Makes a synthetic run (64 x 48 masks, 171 classes) and prints a Markdown table: wall seconds of the command without
the start of Python and Ray, and processor seconds of all processes of ours. Every output is compared with that of
one process.
"""

import argparse
import hashlib
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.measure import tasks_seconds
from benchmarks.report import make_run
from cliper.pipeline.config import load_classes
from cliper.pipeline.export.base import Plan
from cliper.pipeline.export.driver import export
from cliper.pipeline.parallel import Workers
from cliper.pipeline.report.run_page import write_run_report
from cliper.pipeline.review.select import select_images
from cliper.pipeline.run.folder import Run, class_names, read_run
from cliper.pipeline.run.rows import RowFilter
from cliper.pipeline.run.verify import verify_run
from cliper.pipeline.storage.backend import Storage

SIZE = 64, 48
Command = Callable[[Run, Path, Workers], None]


def _export(name: str) -> Command:
    def command(run: Run, output: Path, workers: Workers) -> None:
        plan = Plan(name, run.uri, run.fingerprint, class_names(run.identity), RowFilter(), False)
        export(run, plan, str(output), workers)

    return command


def _verify(run: Run, output: Path, workers: Workers) -> None:
    output.mkdir()
    (output / "report.json").write_text(verify_run(run, workers).to_json())


def _report(run: Run, output: Path, workers: Workers) -> None:
    write_run_report(run, str(output / "index.html"), 10**9, workers)


def _pick(run: Run, output: Path, workers: Workers) -> None:
    output.mkdir()
    (output / "picks.txt").write_text("\n".join(map(repr, select_images(run, 100, workers=workers))))


COMMANDS = {
    "verify": _verify,
    "export --to coco": _export("coco"),
    "export --to webdataset": _export("webdataset"),
    "report": _report,
    "review pick": _pick,
}


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, default=Path("build/readers"))
    parser.add_argument("--only", default="", help="commands whose name contains this")
    arguments = parser.parse_args()
    if not (arguments.folder / "run").is_dir():
        make_run(arguments.folder, arguments.rows, load_classes("coco_stuff"), SIZE)
    run = read_run(str(arguments.folder / "run"), Storage())
    print(
        f"| {arguments.rows:,} rows | 1 process | 4 processes | Ray, 2 nodes | output |\n|---|---:|---:|---:|---|"
    )
    with two_nodes():
        for name, command in COMMANDS.items():
            if arguments.only in name:
                print(f"| {name} | {_row(command, run, arguments.folder / 'output')} |", flush=True)


def _row(command: Command, run: Run, output: Path) -> str:
    seconds, used, digests = [], [], []
    for workers in (1, 4, "ray"):
        shutil.rmtree(output, ignore_errors=True)
        start, processor = time.perf_counter(), _processor()
        command(run, output, workers)
        seconds.append(time.perf_counter() - start)
        used.append(_processor() - processor)
        digests.append(_digest(output))
    shutil.rmtree(output)
    cells = [f"{s:.1f} s ({seconds[0] / s:.2f} x), {c:.1f}" for s, c in zip(seconds, used, strict=True)]
    return " | ".join([*cells, "the same bytes" if len(set(digests)) == 1 else "DIFFERENT"])


def _processor() -> float:
    """Of this process, its ended children and Ray's tasks; a task's process that Ray has ended is not counted."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in usage) + tasks_seconds()


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


@contextmanager
def two_nodes() -> Iterator[None]:
    """A Ray of two logical nodes with two CPUs each on this machine, connected and with its workers started."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    for _ in range(2):
        cluster.add_node(num_cpus=2, object_store_memory=200_000_000, include_dashboard=False)
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
