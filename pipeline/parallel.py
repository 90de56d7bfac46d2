"""Ordered, bounded maps over threads, processes or the tasks of a Ray cluster, and the number of usable CPUs."""

import math
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, TypeVar

from cliper.model.errors import CliperError

A = TypeVar("A")
B = TypeVar("B")

Workers = int | Literal["ray"]  # processes on this machine, or tasks on the connected Ray cluster

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


@dataclass(frozen=True)
class Crew:
    """An executor, and how many calls it runs at the same time."""

    executor: Executor
    size: int

    def map(self, function: Callable[[A], B], items: Iterable[A], most: float = math.inf) -> Iterator[B]:
        """Like map, in order; at most two calls per worker, and `most`, are running or waiting to be consumed.

        The function and its arguments are pickled for processes and Ray. It may be called again for an item whose
        worker died (Ray).
        """
        return map_ahead(self.executor, function, items, ahead=int(min(2 * self.size, most)))


@contextmanager
def crew(workers: Workers, most: float = math.inf, threads: int = 1) -> Iterator[Crew]:
    """Start `workers`, at most `most` processes; a single one is `threads` threads of this process.

    "ray" needs a connection to Ray (ray.init). An error inside the block cancels calls that wait, and waits for
    those that run, so that none writes afterwards; Ctrl-C does not wait.
    """
    if workers == "ray":
        executor: Executor = _RayTasks()
        size = _cluster_cpus()
    elif min(workers, most) <= 1:
        executor, size = ThreadPoolExecutor(threads), threads
    else:
        size = int(min(workers, most))
        # Spawned: S3 clients do not survive a fork.
        executor = ProcessPoolExecutor(size, get_context("spawn"), initializer=_leave_interrupts)
    try:
        yield Crew(executor, size)
    except Exception:
        executor.shutdown(wait=True, cancel_futures=True)
        raise
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        raise
    executor.shutdown()


def _leave_interrupts() -> None:
    """Ignore Ctrl-C, which a terminal sends to every process: only the main process stops at once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _cluster_cpus() -> int:
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)))


class _RayTasks(Executor):
    """Calls as Ray tasks of one CPU each, spread over the nodes; Ray repeats those of a node that died."""

    def __init__(self) -> None:
        import ray

        self._ray = ray
        self._call = ray.remote(num_cpus=1, max_retries=3, scheduling_strategy="SPREAD")(_outcome)
        self._functions: dict[
            int, tuple[Any, Any]
        ] = {}  # id to the function, which is sent once, and its reference
        self._running: set[Any] = set()

    def submit(self, function: Callable[..., B], /, *args: Any, **options: Any) -> "Future[B]":
        """Start a call. Its CliperError is raised as it is, other errors as Ray reports them."""
        if id(function) not in self._functions:
            self._functions[id(function)] = function, self._ray.put(function)
        reference = self._call.remote(self._functions[id(function)][1], *args, **options)
        done: Future[B] = Future()
        self._running.add(reference)
        reference.future().add_done_callback(partial(self._settle, done, reference))
        return done

    def _settle(self, done: "Future[Any]", reference: Any, finished: "Future[Any]") -> None:
        self._running.discard(reference)
        error = finished.exception()
        value, expected = (None, error) if error is not None else finished.result()
        if expected is not None:
            done.set_exception(expected)
        else:
            done.set_result(value)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Cancel what runs if asked to; results that were consumed are freed already."""
        if cancel_futures:
            for reference in list(self._running):
                self._ray.cancel(reference)
        self._functions.clear()


def _outcome(function: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, CliperError | None]:
    """The function's result, or the error for the user; Ray would wrap a raised one in its own."""
    try:
        return function(*args, **options), None
    except CliperError as error:
        return None, error
