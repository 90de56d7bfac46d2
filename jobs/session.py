"""A Ray to run on: the cluster we are told of, else one of our own for the length of the command."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ray_session(verbose: bool) -> Iterator[dict[str, float]]:
    """Connect to RAY_ADDRESS (set inside `ray job submit`), or start a local Ray and stop it afterwards.

    Yields the cluster's resources, e.g. {"CPU": 8.0, "GPU": 1.0}. Ray's own messages show if `verbose`.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's future default; silences its warning
    with contextlib.nullcontext() if verbose else _quiet():
        import ray

        address = os.environ.get("RAY_ADDRESS")
        local = {} if address else {"include_dashboard": False}
        level = logging.INFO if verbose else logging.ERROR
        ray.init(address=address or "local", log_to_driver=verbose, logging_level=level, **local)
        logging.getLogger("ray.data").setLevel(level)
        try:
            yield ray.cluster_resources()
        finally:
            ray.shutdown()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray's Python warnings and the log lines of its C++ side off the terminal; our own stderr stays.

    The C++ side writes to file descriptor 2 itself, so that is pointed elsewhere while `sys.stderr` moves to a
    copy of it. Ray keeps the same lines in its session folder.
    """
    terminal, ours = os.dup(2), sys.stderr
    with warnings.catch_warnings(), os.fdopen(terminal, "w", buffering=1) as copy:
        warnings.filterwarnings("ignore", module="ray")
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), 2)
        sys.stderr = copy
        try:
            yield
        finally:
            sys.stderr = ours
            os.dup2(terminal, 2)
