"""Memory and speed of the engine by the number of shards: stages that do nothing, on a real Ray.

    python -m benchmarks.scale --shards 400000 --stop 40000

sends shards through the flow's own code (flow.over_shards, and the progress of `cliper label`) and prints one JSON
object: seconds to the first commit, shards/s, processor time, and samples of the resident memory of the driver, of
Ray's GCS and of the raylet, and of the bytes in the object store. Loading, segmenting and writing are one
line each, so that everything else is the cost of a shard beyond its images. `--stop` and
`--seconds` end the run early, with the rest still pending. `--real` labels small photographs instead, one
per shard, by the stages of `cliper label` and a segmenter that does almost nothing, into a run folder.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from cliper.jobs.session import ray_session

PAGE = os.sysconf("SC_PAGE_SIZE")
Flow = Generator[dict[str, Any], None, None]


def resident(pid: int) -> float:
    """Resident memory of a process in MB, without pages that it shares with others."""
    _, whole, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
    return round((int(whole) - int(shared)) * PAGE / 1e6, 1)


def processes(name: str) -> Iterator[int]:
    """Processes of that name below this one."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            program, rest = stat[stat.index("(") + 1 :].rsplit(")", 1)
            if program == name and int(rest.split()[1]) == os.getpid():
                yield int(entry.name)


def stored_bytes() -> int:
    """Bytes in the object store of this node."""
    import ray
    from ray._private.internal_api import node_stats

    node = ray.nodes()[0]
    stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False)
    return int(stats.store_stats.object_store_bytes_used)


def sample(commits: int) -> dict[str, float]:
    """Memory at this moment."""
    found = {name: [resident(pid) for pid in processes(name)] for name in ("gcs_server", "raylet")}
    return {
        "commits": commits,
        "driver_mb": resident(os.getpid()),
        "gcs_mb": sum(found["gcs_server"]),
        "raylet_mb": sum(found["raylet"]),
        "store_mb": stored_bytes() / 1e6,
    }


def load(task: Any) -> pa.Table:
    """A shard of one small image."""
    return pa.table({"shard": [task.shard], "data": [b"x" * 1000]})


def label(table: pa.Table) -> pa.Table:
    """Its label."""
    return table


def write(table: pa.Table) -> pa.Table:
    """Its summary, as write_shard returns it."""
    shard = table.column("shard").to_pylist()
    counts = {"images": [1], "failures": pa.array([[]], pa.list_(pa.string())), "several": [0]}
    return pa.table({"shard": shard, **counts, "bytes": [1], "finished": [time.time()]})


def nothing(shards: int, actors: int) -> Flow:
    """Shards whose stages do nothing."""
    from cliper.pipeline.flow import over_shards
    from cliper.pipeline.label.pool import Pool
    from cliper.pipeline.label.stages import Tasks

    return over_shards(
        Tasks(range(shards)), load=load, actor=lambda: label, write=write, pool=Pool(actors, 0.5, 0)
    )


def photographs(work: Path, shards: int, actors: int) -> Flow:
    """Shards of one photograph of 64 x 48 each, labeled into a run folder."""
    from benchmarks.flow import Quick, make_job, write_corpus
    from cliper.pipeline.config import JobConfig, ShardConfig
    from cliper.pipeline.flow import label_corpus
    from cliper.pipeline.label.pool import Pool
    from cliper.pipeline.label.stages import Tasks

    write_corpus(work / "photos", shards, (48, 64))
    job = make_job(work / "photos", work / "run", JobConfig(shard=ShardConfig(images=1)), Quick)
    return label_corpus(job, Tasks(job.run.pending_shards(job.manifest)), Pool(actors, 0.5, 0))


def measure(flow: Iterator[dict[str, Any]], shards: int, stop: int, limit: float, every: int) -> dict[str, Any]:
    """Take shards from the flow until `stop` commits, or for `limit` seconds."""
    from cliper.jobs.progress import RunProgress

    progress, samples, first = RunProgress(shards, 0), [sample(0)], 0.0
    began, cpu = time.perf_counter(), time.process_time()
    for commits, summary in enumerate(flow, 1):
        first = first or time.perf_counter() - began
        progress.add(summary)
        seconds = time.perf_counter() - began
        ends = commits == stop or seconds > limit
        if commits % every == 0 or ends:
            samples.append({"seconds": round(seconds, 1), **sample(commits)})
            print(json.dumps(samples[-1]), file=sys.stderr, flush=True)
        if ends:
            break
    spent = time.process_time() - cpu
    return {
        "shards": shards,
        "commits": commits,
        "first_commit_seconds": round(first, 2),
        "shards_per_second": round((commits - 1) / (seconds - first), 1),
        "driver_cpu_ms_per_shard": round(spent / commits * 1000, 2),
        "driver_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
        "samples": samples,
    }


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=int, default=20_000)
    parser.add_argument("--stop", type=int, default=0, help="commits after which to stop; 0: all")
    parser.add_argument("--seconds", type=float, default=1e9, help="time after which to stop")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--every", type=int, default=500, help="commits between two samples")
    parser.add_argument("--real", action="store_true", help="label photographs")
    args = parser.parse_args()
    with ray_session(verbose=False), tempfile.TemporaryDirectory() as folder:  # Ray's environment is that of a run
        import ray

        ray.init(
            "local", num_cpus=4, include_dashboard=False, object_store_memory=200_000_000, logging_level="error"
        )
        try:
            make = partial(photographs, Path(folder)) if args.real else nothing
            with closing(make(args.shards, args.actors)) as flow:
                print(json.dumps(measure(flow, args.shards, args.stop or args.shards, args.seconds, args.every)))
        finally:
            ray.shutdown()


if __name__ == "__main__":
    main()
