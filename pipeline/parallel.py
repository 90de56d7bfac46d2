"""An ordered, bounded, threaded map, and the number of usable CPUs."""

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
    """CPUs that this process may use, at least 1: by its affinity and its container's quota (cgroup v2 or v1)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(cgroup)
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def _quota(cgroup: Path) -> float | None:
    """The container's CPU quota in CPUs, or None if there is no limit."""
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

    The waiting results also cost at most `budget` in total, unless one item alone exceeds it: an item starts only
    when its cost fits. Items start in order, so no item waits for budget that only a later one could free.
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
