"""A Ray to run on: the cluster we are told of, else one of our own for the length of the command; and its end."""

import contextlib
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer

from cliper.pipeline.errors import ResourceError

INTERRUPTED, TERMINATED = 130, 143  # what a shell reports for a program stopped with Ctrl-C, with SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM, which `ray job stop` and cluster managers send: stops the work as Ctrl-C does."""


@contextmanager
def clean_stop(what: str) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM inside the block into a line that names `what` and exit code 130 or 143."""
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except KeyboardInterrupt as stop:
        print(f"stopped; the same command continues {what}", file=sys.stderr)
        raise typer.Exit(TERMINATED if isinstance(stop, Terminated) else INTERRUPTED) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise Terminated


@contextmanager
def ray_session(verbose: bool) -> Iterator[list[dict[str, float]]]:
    """Connect to RAY_ADDRESS (set inside `ray job submit`), or start a local Ray and stop it afterwards.

    Yields the resources of each node, e.g. [{"CPU": 8.0, "GPU": 1.0}]. Ray's own messages show if `verbose`.
    Raises ResourceError if there is no Ray to be had.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's future default; silences its warning
    with contextlib.nullcontext() if verbose else _quiet():
        import ray

        address = os.environ.get("RAY_ADDRESS")
        local = {} if address else {"include_dashboard": False}
        level = logging.INFO if verbose else logging.ERROR
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=address or "local", log_to_driver=verbose, logging_level=level, **local)
        except Exception as error:  # Ray has no type of its own for it
            where = f"reached at RAY_ADDRESS={address}" if address else "started here"
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ResourceError(f"Ray could not be {where}: {reason}") from error
        signal.signal(signal.SIGTERM, handler)  # Ray put its own in place, which ends the process at once
        logging.getLogger("ray.data").setLevel(level)
        try:
            yield [node["Resources"] for node in ray.nodes() if node["Alive"]]
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
