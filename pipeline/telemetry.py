"""What a run does, as Prometheus metrics of the cluster it runs on, each with the run's URI as label `run`.

Ray collects them from every process and serves them, prefixed `ray_`, on each node's metrics port, from where
Prometheus scrapes them; configs/grafana/cliper.json is a dashboard. Names and meanings are in METRICS. One
record costs microseconds beside images that cost milliseconds. Outside Ray nothing is recorded.
"""

import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

Stage = Literal["load", "decode", "segment", "encode", "write"]

# Name: (kind, tag, meaning). Prometheus adds `ray_` in front.
METRICS: dict[str, tuple[str, str, str]] = {
    "cliper_images_total": ("Counter", "status", "images committed, by status"),
    "cliper_failures_total": ("Counter", "error_type", "committed images without a mask, by cause"),
    "cliper_shards_total": ("Counter", "", "shards committed"),
    "cliper_written_bytes_total": ("Counter", "", "bytes of committed shards"),
    "cliper_stage_seconds_total": ("Counter", "stage", "seconds of work, summed over threads and processes"),
    "cliper_device_memory_bytes": ("Gauge", "kind", "GPU memory of an actor: allocated, peak, free or total"),
}


@contextmanager
def timed(stage: Stage, run: str) -> Iterator[None]:
    """Add the time spent inside to a stage of a run, also if it raises."""
    start = time.perf_counter()
    try:
        yield
    finally:
        record("cliper_stage_seconds_total", time.perf_counter() - start, run, stage)


def committed(run: str, statuses: Iterable[str], causes: Iterable[str], size: int) -> None:
    """Count a shard that was written: the status of each row, each failure's error type, and the file's bytes.

    A shard that is written again, after a lost task or by `cliper retry`, counts again.
    """
    for status, count in Counter(statuses).items():
        record("cliper_images_total", count, run, status)
    for cause, count in Counter(causes).items():
        record("cliper_failures_total", count, run, cause)
    record("cliper_shards_total", 1, run)
    record("cliper_written_bytes_total", size, run)


def watch_device(run: str) -> None:
    """Record the GPU memory of this process, if it has a GPU. How busy a GPU is, Ray's own metrics tell."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():  # asking more would open a context on the GPU
        return
    free, total = torch.cuda.mem_get_info()
    levels = {"allocated": torch.cuda.memory_allocated(), "peak": torch.cuda.max_memory_allocated()}
    for kind, size in (levels | {"free": free, "total": total}).items():
        record("cliper_device_memory_bytes", size, run, kind)


def device_name() -> str:
    """What this process computes on: "cpu", or the GPU's name once torch uses it."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return "cpu"
    return str(torch.cuda.get_device_name())


def record(name: str, value: float, run: str, tag: str = "") -> None:
    """Add to a counter, or set a gauge, of METRICS. Does nothing in a process that is not part of a Ray."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return
    kind, key, _ = METRICS[name]
    tags = {"run": run} | ({key: tag} if key else {})
    if kind == "Gauge":
        _metric(name).set(value, tags=tags)
    elif value > 0:
        _metric(name).inc(value, tags=tags)


@cache
def _metric(name: str) -> Any:
    """One object per process: to make one registers it."""
    from ray.util import metrics

    kind, key, meaning = METRICS[name]
    return getattr(metrics, kind)(name, description=meaning, tag_keys=("run", key) if key else ("run",))
