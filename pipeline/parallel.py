"""Work ahead of the consumer, in order, within a bound; and how many CPUs there are to do it with."""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")

_CGROUP = Path("/sys/fs/cgroup")


def cpus(cgroup: Path = _CGROUP) -> int:
    """CPUs this process may use, at least 1: its affinity, and the quota of its container (cgroup v2 or v1)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(cgroup)
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def _quota(cgroup: Path) -> float | None:
    """CPUs' worth of time the container gets, or None without a limit."""
    try:
        limit, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            limit = (cgroup / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    return None if limit in ("max", "-1") else int(limit) / int(period)


def map_ahead(
    pool: Executor,
    function: Callable[[A], B],
    items: Iterable[A],
    ahead: int,
    cost: Callable[[A], int] = lambda item: 0,
    budget: int = 0,
) -> Iterator[B]:
    """Like map, in order, with at most `ahead` results computed or waiting beyond the one consumed.

    What waits also costs at most `budget` together, or is one item: an item starts only when there is room, and
    items start in order, so that none waits for room that only a later one could give back.
    """
    futures: deque[tuple[Future[B], int]] = deque()
    held = 0
    for item in items:
        price = cost(item)
        while futures and (len(futures) > ahead or held + price > budget):
            future, freed = futures.popleft()
            held -= freed
            yield future.result()
            del future  # its result may be large
        futures.append((pool.submit(function, item), price))
        held += price
    while futures:
        yield futures.popleft()[0].result()
