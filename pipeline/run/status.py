"""The progress of a run, read from any machine at little cost: file names and times, file footers, the lease.

Shard files mark finished shards, the store's file times give the rate, and each footer lists failures
(shards.FAILURES). Reading writes nothing and does not contact the driver.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from cliper.pipeline.corpus.manifest import read_manifest
from cliper.pipeline.errors import RunError, StorageError
from cliper.pipeline.parallel import map_ahead
from cliper.pipeline.run.attempts import Attempts, attempted_shard
from cliper.pipeline.run.changed import changed_shards
from cliper.pipeline.run.folder import Run
from cliper.pipeline.run.heartbeat import Heartbeat, read_heartbeat
from cliper.pipeline.run.lease import LEASE_FILE, Holder
from cliper.pipeline.run.reader import open_shard
from cliper.pipeline.run.shards import FAILURES, shard_number
from cliper.pipeline.storage.uris import join

RECENT = 64  # shards whose times give the rate
READERS = 16  # footers read at once: they wait for storage


@dataclass(frozen=True)
class Started:
    """A shard that was started and is not committed yet."""

    shard: int
    starts: int  # more than 1: it was restarted; 0: its notes could not be read
    deaths: int  # of processes, while one of its images was labeled alone
    image: str | None  # the current image, if they are labeled one by one


@dataclass(frozen=True)
class Status:
    """A run at one moment. Times are seconds since 1970 by the store's clock."""

    uri: str
    fingerprint: str
    state: str  # not listed, listing, running, stopped or done
    images: int
    images_done: int
    shards: int
    shards_done: int
    rate: float | None  # images/s over the last RECENT shards of the current driver, or of the last one
    last_write: float | None
    seconds_left: float | None  # at that rate; None unless a driver is running
    failures: dict[str, int] | None  # error_type to images; None if not requested
    unreadable: int  # files whose footer could not be read
    driver: dict[str, Any] | None  # the lease holder; `lives` is None if this machine cannot check its process
    started: tuple[Started, ...]
    progress: Heartbeat | None  # what the driver itself shows, at most a minute old; None if no driver works
    changed: int = 0  # shards with images to label again (run/changed.py)
    unlisted: int = 0  # label files in a run whose list of images is gone

    def to_json(self) -> str:
        """The status as indented JSON."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)


def read_status(run: Run, failures: bool = True) -> Status:
    """Read the status of a run. Without `failures`, footers are not read. Raises StorageError."""
    manifest = read_manifest(run.storage, run.uri)
    holder = read_holder(run)
    working = holder is not None and holder.lives() is not False
    sizes = {} if manifest is None else dict(enumerate(manifest.counts))
    written = shard_times(run)
    times = {shard: time for shard, time in written.items() if shard in sizes}
    images, done = sum(sizes.values()), sum(sizes[shard] for shard in times)
    rate = recent_rate(sizes, times, _epoch(holder.since) if holder is not None and working else 0.0)
    changed = len(changed_shards(run))
    causes, unreadable = failure_causes(run, sorted(times)) if failures else (None, 0)
    return Status(
        uri=run.uri,
        fingerprint=run.fingerprint,
        state=_state(manifest is not None, working, len(times) == len(sizes) and not changed),
        images=images,
        images_done=done,
        shards=len(sizes),
        shards_done=len(times),
        rate=rate,
        last_write=max(times.values(), default=None),
        seconds_left=(images - done) / rate if working and rate else None,
        failures=causes,
        unreadable=unreadable,
        driver=None if holder is None else _describe(holder),
        started=started_shards(run),
        progress=read_heartbeat(run) if working else None,
        changed=changed,
        unlisted=len(written) if manifest is None else 0,
    )


def _state(listed: bool, working: bool, done: bool) -> str:
    if not listed:
        return "listing" if working else "not listed"
    return "running" if working else "done" if done else "stopped"


def shard_times(run: Run) -> dict[int, float]:
    """The time each finished shard was written; 0 if the backend has no file times."""
    times = {}
    try:
        for stored in run.storage.list_stored(join(run.uri, "labels")):
            shard = shard_number(stored.name)
            if shard is not None:
                times[shard] = stored.modified or 0.0
    except FileNotFoundError:
        return {}
    return times


def recent_rate(sizes: Mapping[int, int], times: Mapping[int, float], since: float) -> float | None:
    """Images per second between the first and the last of the RECENT shards written after `since`.

    None for fewer than two shards, or for equal times. The first shard only marks the start: its images were
    labeled before it was written.
    """
    recent = sorted((time, shard) for shard, time in times.items() if time >= since)[-RECENT:]
    if len(recent) < 2 or recent[-1][0] <= recent[0][0]:
        return None
    return sum(sizes[shard] for _, shard in recent[1:]) / (recent[-1][0] - recent[0][0])


def failure_causes(run: Run, shards: Sequence[int]) -> tuple[dict[str, int], int]:
    """Failed images by error_type, the most frequent first, and the number of unreadable files."""
    total: Counter[str] = Counter()
    unreadable = 0
    with ThreadPoolExecutor(READERS) as pool:
        for found in map_ahead(pool, lambda shard: failures_of(run, shard), shards, ahead=2 * READERS):
            if found is None:
                unreadable += 1
            else:
                total.update(found)
    return dict(total.most_common()), unreadable


def failures_of(run: Run, shard: int) -> dict[str, int] | None:
    """Failed images of one shard by error_type, from the file's footer; None if it cannot be read."""
    try:
        with open_shard(run, shard, most=0) as file:
            metadata = file.metadata.metadata or {}
        found: dict[str, int] = json.loads(metadata[FAILURES])
    except (RunError, StorageError, ValueError, KeyError):
        return None  # `cliper verify` says why
    return found


def read_holder(run: Run) -> Holder | None:
    """The holder of the run's lease, or None."""
    try:
        return Holder.parse(run.storage.read(join(run.uri, LEASE_FILE)))
    except FileNotFoundError:
        return None


def started_shards(run: Run) -> tuple[Started, ...]:
    """Shards that were started and not committed, from their attempts files: at most those that actors hold."""
    found = []
    try:
        numbers = [attempted_shard(name) for name, _ in run.storage.list_files(join(run.uri, "attempts"))]
    except FileNotFoundError:
        return ()
    for shard in numbers:
        if shard is None:
            continue
        attempts = Attempts.read(run.storage, run.uri, shard)
        if attempts is None:  # damaged: its shard is labeled from the beginning
            found.append(Started(shard, 0, 0, None))
        else:
            found.append(Started(shard, attempts.starts, attempts.deaths.total(), attempts.current))
    return tuple(found)


def _describe(holder: Holder) -> dict[str, Any]:
    return {
        "host": holder.host,
        "pid": str(holder.pid),
        "since": holder.since,
        "renewed": holder.renewed,
        "lives": holder.lives(),
    }


def _epoch(iso: str) -> float:
    try:
        return datetime.fromisoformat(iso).timestamp()
    except ValueError:  # a damaged lease
        return 0.0
