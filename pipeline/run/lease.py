"""One driver at a time: lease.json in a run folder names the holder.

Two drivers would not damage the masks, since both write the same rows under the same names, but they would
duplicate the work. A lease is renewed every third of its lifetime and removed at the end. A driver that finds a
lease decides without comparing clocks: on the holder's machine it checks whether that process is alive; on another
machine it waits to see whether the lease changes within its lifetime. An unchanged lease is taken over. A holder
whose lease was taken over (it was suspended, or lost the network) detects this at its next renewal and stops.

With conditional writes (conditional.py), acquisition is exclusive. Without them, a driver writes, waits
SETTLE_SECONDS and reads back: of two writers, the last one holds the lease. One race remains: a driver that pauses
for longer than that between reading and writing; its rival stops at its next renewal.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from cliper.pipeline.errors import LeaseError, StorageError
from cliper.pipeline.storage.backend import Storage
from cliper.pipeline.storage.conditional import decides, read_versioned, write_if
from cliper.pipeline.storage.uris import is_local, join

LEASE_FILE = "lease.json"
TTL_SECONDS = 60.0
SETTLE_SECONDS = 2.0
_LONGEST_TTL = 3600.0  # upper bound on the lifetime that a file can claim


@dataclass(frozen=True)
class Holder:
    """The content of lease.json. Times are UTC and only displayed; no decision depends on them."""

    id: str  # random, one per command
    host: str
    pid: int
    machine: str  # boot and process-id namespace; "" if unknown (no /proc)
    process_started: int  # clock ticks after boot, which distinguish processes that reuse a process id
    since: str
    renewed: str
    ttl_seconds: float

    @classmethod
    def me(cls, ttl: float) -> "Holder":
        """A new holder: this process, from now on."""
        started, now = _process_started(os.getpid()) or 0, _now()
        return cls(uuid.uuid4().hex, socket.gethostname(), os.getpid(), _machine(), started, now, now, ttl)

    @classmethod
    def parse(cls, content: bytes) -> "Holder":
        """Parse lease.json. A damaged one is treated as that of an unknown holder, and expires like any other."""
        try:
            return TypeAdapter(cls).validate_json(content)
        except ValidationError:
            return cls("", "an unknown machine", 0, "", 0, "an unknown time", "", TTL_SECONDS)

    def encode(self) -> bytes:
        """The content of lease.json."""
        return json.dumps(asdict(self), indent=2).encode()

    def lives(self) -> bool | None:
        """Whether the process is alive; None if it runs on another machine, or if there is no /proc."""
        if not self.machine or self.machine != _machine():
            return None
        return _process_started(self.pid) == self.process_started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


@contextmanager
def hold(run_uri: str, storage: Storage, ttl: float = TTL_SECONDS) -> Iterator[None]:
    """Hold the lease of a run folder until the block ends.

    Raises LeaseError at once if a driver on this machine holds it, after at most `ttl` seconds if a driver on
    another machine does, and from inside the block (interrupted as by Ctrl-C) if another driver took over.
    """
    lease = Lease(run_uri, storage, ttl)
    lease.take()
    try:
        yield
    except KeyboardInterrupt:
        if lease.lost is not None:
            raise lease.lost from None
        raise
    finally:
        lease.release()


class Lease:
    """The lease of one run folder, and the thread that renews it."""

    def __init__(self, run_uri: str, storage: Storage, ttl: float) -> None:
        self.run_uri, self.uri, self.storage, self.ttl = run_uri, join(run_uri, LEASE_FILE), storage, ttl
        self.me = Holder.me(ttl)
        self.lost: LeaseError | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep_renewed, name="lease", daemon=True)

    def take(self) -> None:
        """Acquire the lease and start renewing it. Raises LeaseError if another driver holds it."""
        while not self._won(self._vacant()):
            pass  # another driver seems to have been faster: read the holder again
        self._thread.start()

    def release(self) -> None:
        """Stop renewing, and remove the file if this process still holds the lease."""
        self._over.set()
        self._thread.join(timeout=10)
        with suppress(StorageError, FileNotFoundError):  # it expires on its own
            if self._holder() == self.me.id:
                self.storage.remove(self.uri)

    def _vacant(self) -> str | None:
        """The version of a dead driver's lease, or None if there is no lease."""
        found = read_versioned(self.storage, self.uri)
        if found is None:
            return None
        content, version = found
        holder = Holder.parse(content)
        lives = holder.lives()
        if lives:
            raise self._held(holder)
        return self._watch(holder, version) if lives is None else version

    def _watch(self, holder: Holder, version: str) -> str | None:
        """Wait for the lease to change, which shows that the holder is alive. Uses this process's clock only."""
        ttl = min(max(holder.ttl_seconds, 1.0), _LONGEST_TTL)
        print(f"{self.uri} belongs to {holder}; waiting {ttl:.0f} s for a renewal", file=sys.stderr)
        end = time.monotonic() + ttl
        while time.monotonic() < end:
            time.sleep(min(ttl / 12, 5.0))
            found = read_versioned(self.storage, self.uri)
            if found is None:
                return None
            if found[1] != version:
                raise self._held(Holder.parse(found[0]))
        return version

    def _won(self, version: str | None) -> bool:
        """Replace `version` with our lease, and read back the holder."""
        content = self.me.encode()
        outcome = write_if(self.storage, self.uri, content, version)
        if outcome == "done" and not is_local(self.uri) and not decides(self.storage, self.uri, content):
            outcome = "unconditional"
        if outcome == "unconditional":
            time.sleep(SETTLE_SECONDS)
        return self._holder() == self.me.id  # also after a refusal: the first PUT makes a retried one fail

    def _holder(self) -> str | None:
        found = read_versioned(self.storage, self.uri)
        return None if found is None else Holder.parse(found[0]).id

    def _keep_renewed(self) -> None:
        while not self._over.wait(self.ttl / 3):
            try:
                self._renew()
            except LeaseError as error:
                self.lost = error
                _interrupt_main()
                return
            except (StorageError, FileNotFoundError):
                continue  # the lease cannot be taken over while the store is down; the next renewal decides

    def _renew(self) -> None:
        found = read_versioned(self.storage, self.uri)
        holder = None if found is None else Holder.parse(found[0])
        if found is None or holder is None or holder.id != self.me.id:
            reason = "its lease.json was removed" if holder is None else f"it was taken over by {holder}"
            raise LeaseError(f"stopped working on {self.run_uri}: {reason}; finished shards are kept")
        # A refusal here means that another driver took over after the read: the next renewal detects it.
        write_if(self.storage, self.uri, replace(holder, renewed=_now()).encode(), found[1])

    def _held(self, holder: Holder) -> LeaseError:
        return LeaseError(
            f"{self.run_uri} is in use by {holder}; its lease was renewed at {holder.renewed} and "
            f"expires {holder.ttl_seconds:.0f} s after that. Stop that process or wait until it is done; "
            "the same command then continues"
        )


def _interrupt_main() -> None:
    """Interrupt the main thread as Ctrl-C does, or as SIGTERM does if Ctrl-C is ignored (a shell's `&`)."""
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM if ignored else signal.SIGINT)


def _machine() -> str:
    """The scope of a process id: this boot and this process-id namespace (each container has one)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _process_started(pid: int) -> int | None:
    """The start time of a process on this machine, in clock ticks after boot; None if it is gone or a zombie."""
    try:
        # The name, in parentheses, may contain spaces and parentheses; then state, ..., start time
        # (proc_pid_stat(5)).
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
