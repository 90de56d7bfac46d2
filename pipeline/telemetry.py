"""Prometheus metrics of a run, each with the run's URI as label `run`.

Ray collects them from every process and serves them, prefixed `ray_`, on each node's metrics port, for Prometheus
to scrape; configs/grafana/cliper.json is a dashboard. METRICS lists names and meanings. One record costs
microseconds; an image costs milliseconds. Outside Ray nothing is recorded.
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
    """Add the duration of the block to a stage of a run, even if the block raises."""
    start = time.perf_counter()
    try:
        yield
    finally:
        record("cliper_stage_seconds_total", time.perf_counter() - start, run, stage)


def committed(run: str, statuses: Iterable[str], causes: Iterable[str], size: int) -> None:
    """Count a committed shard: the status of each row, each failure's error type, and the file's bytes.

    A shard that is rewritten, after a lost task or by `cliper retry`, counts again.
    """
    for status, count in Counter(statuses).items():
        record("cliper_images_total", count, run, status)
    for cause, count in Counter(causes).items():
        record("cliper_failures_total", count, run, cause)
    record("cliper_shards_total", 1, run)
    record("cliper_written_bytes_total", size, run)


def watch_device(run: str) -> None:
    """Record the GPU memory of this process, if it has a GPU. GPU utilization is among Ray's own metrics."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():  # asking more would open a context on the GPU
        return
    free, total = torch.cuda.mem_get_info()
    levels = {"allocated": torch.cuda.memory_allocated(), "peak": torch.cuda.max_memory_allocated()}
    for kind, size in (levels | {"free": free, "total": total}).items():
        record("cliper_device_memory_bytes", size, run, kind)


def device_name() -> str:
    """The device of this process: the GPU's name once torch uses it, else "cpu"."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return "cpu"
    return str(torch.cuda.get_device_name())


def record(name: str, value: float, run: str, tag: str = "") -> None:
    """Add to a counter, or set a gauge, of METRICS. Does nothing in a process outside Ray."""
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
    """The process's only object for a metric: creating a second one would register it twice."""
    from ray.util import metrics

    kind, key, meaning = METRICS[name]
    return getattr(metrics, kind)(name, description=meaning, tag_keys=("run", key) if key else ("run",))
