"""Connect to the configured Ray cluster, or start a local one for the length of the command."""

import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib import import_module
from threading import Thread
from types import FrameType
from typing import TYPE_CHECKING

import typer

from cliper.model.allocator import KEEP_FREED_MEMORY
from cliper.pipeline.config import ResourceConfig
from cliper.pipeline.errors import ResourceError

if TYPE_CHECKING:
    from cliper.pipeline.label.pool import Node, Pool

CONNECT_SECONDS = 60.0  # to wait for an address to answer
CPU_SECONDS = 600.0  # for other jobs to leave a CPU free
SAY_EVERY = 10.0  # seconds between two messages while waiting

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's future default; silences its warning
    "RAY_NUM_REDIS_GET_RETRIES": "1",  # fail after 40 s instead of 13 minutes if another program has the port
}

_LOCAL_ENVIRONMENT = {
    # Ray ends a worker that is idle for a second, and another one imports everything again for the next shard.
    "RAY_idle_worker_killing_time_threshold_ms": "600000",
    # No record of tasks, which nothing shows on a local Ray: those of Ray Data's helpers grow the GCS by 10 kB/s.
    "RAY_task_events_report_interval_ms": "0",
}

INTERRUPTED, TERMINATED = 130, 143  # a shell's exit codes after Ctrl-C and SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM, sent by `ray job stop` and cluster managers: stops the command as Ctrl-C does."""


@contextmanager
def clean_stop(what: str) -> Iterator[None]:
    """On Ctrl-C or SIGTERM inside the block, print a line that names `what` and exit with 130 or 143."""
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


class RaySession:
    """A lazy connection to the cluster at RAY_ADDRESS, or to a local one started on first use."""

    def __init__(self, verbose: bool, wait: float, held: ExitStack) -> None:
        """`verbose` shows Ray's own messages; `wait` is the time in seconds to wait for free resources."""
        self.verbose, self.wait, self._held = verbose, wait, held
        self._connected = self._keeps_memory = False
        self._free: float | None = None  # CPUs, before tasks of this command

    def connect(self) -> None:
        """Connect, once. Raises ResourceError with Ray's own reason if that fails."""
        if not self._connected:
            self._keeps_memory = self._held.enter_context(_connected(self.verbose))
            self._connected = True

    def nodes(self) -> "list[Node]":
        """The nodes of the cluster with their free resources."""
        from cliper.pipeline.label.cluster import cluster_nodes

        self.connect()
        return cluster_nodes()

    def use_tasks(self) -> None:
        """Connect, and wait for a CPU that tasks of this command can use; `pool` waits until they release theirs.

        Raises ResourceError.
        """
        from cliper.pipeline.label.cluster import wait_for_cpu

        self.connect()
        self._free = wait_for_cpu(CPU_SECONDS, say)

    def wants_gpu(self, wanted: ResourceConfig) -> bool:
        """Whether a run's actors go on GPUs. Connects only if the settings leave that to a cluster."""
        from cliper.pipeline.label.pool import wants_gpu

        if wanted.device == "auto" and not os.environ.get("RAY_ADDRESS"):
            return _local_gpus() > 0
        return wants_gpu(wanted, self.nodes() if wanted.device == "auto" else [])

    def pool(self, wanted: ResourceConfig) -> "Pool":
        """Plan the pool, wait for it if asked to, and print it. Raises ResourceError."""
        from cliper.pipeline.label.cluster import wait_for_pool, wait_for_release
        from cliper.pipeline.label.pool import describe_pool

        self.connect()
        if self._free is not None:
            wait_for_release(self._free)
        pool = replace(wait_for_pool(wanted, self.wait, say), keeps_memory=self._keeps_memory)
        nodes = self.nodes()
        say(f"starting {describe_pool(pool, nodes)}")
        if wanted.device == "auto" and not pool.gpus_per_actor:
            say("the cluster has no GPUs: the actors compute on CPUs")
        return pool


def _local_gpus() -> int:
    """GPUs that a Ray on this machine would find, by Ray's own detection, without starting one."""
    from ray._private.accelerators import get_accelerator_manager_for_resource

    manager = get_accelerator_manager_for_resource("GPU")
    found: int = manager.get_current_node_num_accelerators()
    visible = manager.get_current_process_visible_accelerator_ids()
    return found if visible is None else min(found, len(visible))


@contextmanager
def ray_session(verbose: bool, wait: float = 0.0) -> Iterator[RaySession]:
    """A RaySession whose connection, or local Ray, is closed when the block ends."""
    with ExitStack() as held:
        held.enter_context(_environment())  # Ray reads it once, as it is imported
        yield RaySession(verbose, wait, held)


def say(text: str) -> None:
    """Print one line to stderr and flush it."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _connected(verbose: bool) -> Iterator[bool]:
    """Yield whether Ray's processes keep freed memory: those of a local Ray without GPUs inherit that setting.

    An actor with extra environment variables cannot use a process that Ray has already started.
    """
    with ExitStack() as held:
        address = os.environ.get("RAY_ADDRESS", "")
        say(f"connecting to Ray at {address} (RAY_ADDRESS)" if address else "starting Ray on this machine")
        if address not in ("", "auto"):
            _check_address(address)
            _await_port(address, CONNECT_SECONDS)
        held.enter_context(contextlib.nullcontext() if verbose else _quiet())
        kept = {} if address or _local_gpus() else KEEP_FREED_MEMORY
        with _variables(kept):
            _init(address, verbose)
        try:
            yield bool(kept)
        finally:
            import ray

            ray.shutdown()


def _init(address: str, verbose: bool) -> None:
    import ray

    ahead = Thread(target=import_module, args=("pandas",), daemon=True)  # ray.data needs it; Ray starts meanwhile
    ahead.start()
    local = {} if address else {"include_dashboard": False}
    level = logging.INFO if verbose else logging.ERROR
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address or "local", log_to_driver=verbose, logging_level=level, **local)
    except Exception as error:  # Ray has no specific exception type for this
        raise ResourceError(explain_ray(error, address)) from error
    signal.signal(signal.SIGTERM, handler)  # Ray's own handler ends the process at once
    ahead.join()
    import ray.data  # configures its logging as it is imported

    for console in logging.getLogger("ray.data").handlers:
        if isinstance(console, logging.StreamHandler) and not verbose:
            console.setLevel(
                logging.CRITICAL + 1
            )  # an error reaches the user as an exception; the log file has all


def explain_ray(error: Exception, address: str) -> str:
    """The message for a failed connection or start: Ray's full reason on one line, and a remedy."""
    text = " ".join(" ".join((str(error) or type(error).__name__).split()).split(" To fix this, either:")[:1])
    remedy = next((advice for sign, advice in _REMEDIES if sign.lower() in text.lower()), "")
    where = f"reached at RAY_ADDRESS={address}" if address else "started here"
    return f"Ray cannot be {where}: {text[:1500]}{f'; {remedy}' if remedy else ''}"


# (part of Ray's text, remedy); the first match is used.
_REMEDIES = (
    ("version mismatch", "install the cluster's Ray and Python here, or submit the command as a job"),
    ("token", "set RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's token and RAY_AUTH_MODE=token"),
    ("no space left", "free the disk, or set RAY_TMPDIR to a folder with room"),
    ("read-only file system", "set RAY_TMPDIR to a folder that can be written"),
    ("permission denied", "set RAY_TMPDIR to a folder that this user can write"),
    (
        "address already in use",
        "another Ray or program has the port; stop it (ray stop), or set RAY_ADDRESS",
    ),
    ("af_unix path", "set RAY_TMPDIR to a folder with a shorter name"),
    (
        "failed to connect to",
        "check the host and the port: a head's default is 6379, and 8265 is for jobs; a cluster with token "
        "authentication needs RAY_AUTH_MODE=token, and its token in RAY_AUTH_TOKEN or ~/.ray/auth_token",
    ),
    ("timed out", "the machine may be overloaded; run the command again, or with --verbose to see Ray's messages"),
    ("failed to start", "run with --verbose to see Ray's messages; its logs are in /tmp/ray/session_latest/logs"),
)


def _check_address(address: str) -> None:
    """Raise ResourceError for an address that is not HOST:PORT of a head."""
    scheme, _, rest = address.rpartition("://")
    if scheme in ("http", "https"):
        raise ResourceError(
            f"RAY_ADDRESS={address} is for jobs. Submit the command (ray job submit --address {address} "
            f"-- cliper ...), or connect to the cluster itself: RAY_ADDRESS={rest.partition(':')[0]}:6379"
        )
    if scheme:
        raise ResourceError(
            f"RAY_ADDRESS={address}: {scheme}:// is not supported; use HOST:PORT of the head (default port 6379)"
        )
    if not rest.rpartition(":")[2].isdigit() or ":" not in rest:
        raise ResourceError(f"RAY_ADDRESS={address}: expected HOST:PORT of the head, e.g. {rest}:6379")


def _await_port(address: str, seconds: float) -> None:
    """Wait until the head's port answers. Raises ResourceError after `seconds`, with the network's reason."""
    host, _, port = address.rpartition(":")
    end, said = time.monotonic() + seconds, time.monotonic()
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() >= end:
                raise ResourceError(
                    f"no Ray answers at RAY_ADDRESS={address} after {seconds:g} s ({error.strerror or error}); "
                    "start the cluster (ray start --head), correct RAY_ADDRESS, or unset it to run on this machine"
                ) from error
            if time.monotonic() - said >= SAY_EVERY:
                said = time.monotonic()
                say(f"no answer yet from {address}, {end - said:.0f} s left: {error.strerror or error}")
        time.sleep(0.5)


@contextmanager
def _environment() -> Iterator[None]:
    """Settings for Ray, and a token for a local one; settings that the user made are left alone.

    Without the token, Ray writes ~/.ray/auth_token, and every later `ray start` of this user would ask for it.
    """
    local = {} if os.environ.get("RAY_ADDRESS") else _LOCAL_ENVIRONMENT
    for name, value in (_ENVIRONMENT | local).items():
        os.environ.setdefault(name, value)
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    if os.environ.get("RAY_ADDRESS") or "ray" in sys.modules or any(name in os.environ for name in names):
        yield
        return
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)


@contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set the environment variables that the user has not set, until the block ends."""
    ours = {name: value for name, value in values.items() if name not in os.environ}
    os.environ |= ours
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide Ray's Python warnings and the log lines of its C++ core, but not our own stderr.

    The C++ core writes to file descriptor 2 directly, so 2 is redirected to /dev/null and `sys.stderr` to a copy
    of the terminal. Ray keeps the same lines in its session folder.
    """
    terminal, ours = os.dup(2), sys.stderr
    with warnings.catch_warnings(), os.fdopen(terminal, "w", buffering=1) as copy:
        warnings.filterwarnings("ignore", module="ray")
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), 2)
        sys.stderr = copy
        try:
            with _no_messages():
                yield
        finally:
            sys.stderr = ours
            os.dup2(terminal, 2)


@contextmanager
def _no_messages() -> Iterator[None]:
    """Turn off the thread that prints errors of the cluster on stdout, e.g. of tasks that Ctrl-C has cancelled.

    `log_to_driver=False` does not cover it. This is the switch that Ray's debugger uses; there is no public one.
    """
    from ray._private import worker

    before, worker._worker_logs_enabled = worker._worker_logs_enabled, False
    try:
        yield
    finally:
        worker._worker_logs_enabled = before
