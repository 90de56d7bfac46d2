"""Find the image that kills its process, without cooperation of that process.

An exception affects one row; a segfault or an out-of-memory kill ends the whole actor, which Ray restarts with the
same shard. So every shard keeps a small file, `attempts/shard-000000.json`, written before the work and removed
with the commit. If a shard was started twice before, its images are labeled one by one, and each is named in the
file first. An image that is named at two deaths is poison: it becomes a failed row, and the rest of the shard
continues. Two deaths are required because a lost machine must not mark the current image as poison. For the same
reason a death counts only under the driver that started the attempt: a killed driver takes its actors down with
it.

An image that never finishes is made to kill its process, with the same consequences (`HungWatch`).

The file also keeps the rows of finished images of a shard that takes long, or that waits to be written
(unwritten.py), so that a stopped run loses seconds of work and not the shard. The next attempt takes them over.
They are no commit: only the shard's own file is.
"""

import base64
import faulthandler
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from cliper.pipeline.errors import StorageError
from cliper.pipeline.storage.backend import Storage
from cliper.pipeline.storage.digests import checked, with_digest
from cliper.pipeline.storage.uris import join

Row = dict[str, Any]

CAREFUL_AFTER = 2  # unfinished starts under one driver
POISON_AFTER = 2  # deaths while the image was alone
KEEP_SECONDS = 5.0  # at least, between two writes of finished rows
KEEP_SHARE = 0.05  # of the time, at most, that goes into writing them

_NAME = re.compile(r"shard-(\d{6,})\.json")


@dataclass
class Attempts:
    """The recorded state of a shard in progress: its starts, its deaths by image, and the current image."""

    storage: Storage
    uri: str
    starts: int = 0
    deaths: Counter[str] = field(default_factory=Counter)
    current: str | None = None  # the image at work, where they are taken one by one
    driver: str = ""  # under which driver `starts` were counted
    fresh: bool = False  # whether the process had done nothing before `current`
    noted: float = 0.0  # when this was written, in seconds since 1970
    overdue: bool = False  # whether the last start lasted so long that an image may have hung
    done: list[Row] = field(default_factory=list)  # rows of finished images
    shard: int = 0
    _taken: int = 0  # rows in `done` when this attempt began
    _kept: float = field(default_factory=time.monotonic)  # when rows were last kept
    _cost: float = 0.0  # seconds that took

    @classmethod
    def read(cls, storage: Storage, run_uri: str, shard: int) -> "Attempts | None":
        """Read the shard's file; None if there is none, or if it is damaged, e.g. cut off by a crash."""
        uri = attempts_file(run_uri, shard)
        try:
            found = checked(storage.read(uri))
            known = cls(storage, uri, found["starts"], Counter(found["deaths"]), found["current"], found["driver"])
            known.fresh, known.noted = found.get("fresh", True), found.get("noted", 0.0)
            known.done = [_unpacked(row) for row in found.get("done", [])]
            return known
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return None

    @classmethod
    def begin(
        cls,
        storage: Storage,
        run_uri: str,
        shard: int,
        driver: str,
        image_seconds: float = math.inf,
        fresh: bool = True,
    ) -> "Attempts":
        """Read the shard's file, charge a death to the image it names, and note this start.

        A death is the image's if its process had done nothing before, or if it came after `image_seconds`, the
        time an image may take; else the process may have died of what came before, e.g. a leak, and the image is
        tried in the next one first. `fresh`: whether this process has done nothing yet. Attempts by another driver
        are not counted; of its rows, only those with a mask are taken over.
        """
        attempts = cls.read(storage, run_uri, shard) or cls(storage, attempts_file(run_uri, shard))
        attempts.shard = shard
        late = time.time() - attempts.noted >= image_seconds
        if attempts.driver != driver:
            attempts.driver, attempts.starts, attempts.current, late = driver, 0, None, False
            attempts.done = [row for row in attempts.done if row["status"] == "ok"]
        attempts._taken = len(attempts.done)
        attempts.overdue = late and attempts.starts > 0
        attempts.starts += 1
        if attempts.current is not None and (attempts.fresh or late):
            attempts.deaths[attempts.current] += 1
        attempts.current, attempts.fresh = None, fresh
        attempts._write()
        return attempts

    @property
    def careful(self) -> bool:
        """Whether earlier starts died often enough, or so late, to go image by image."""
        return self.starts > CAREFUL_AFTER or self.overdue or self.deaths.total() > 0

    def is_poison(self, image_id: str) -> bool:
        """Whether the process died too often while it labeled this image alone."""
        return self.deaths[image_id] >= POISON_AFTER

    def note(self, image_id: str | None) -> None:
        """Write down the image about to be touched."""
        self.fresh = self.fresh and self.current is None
        self.current = image_id
        self._write()

    def remember(self, row: Row) -> None:
        """Add the row of a finished image; it is written with the next `note`."""
        self.done.append(row)

    def worth_keeping(self, images_left: int) -> bool:
        """Whether rows should be kept now: images are left, and the last time is long enough ago."""
        wait = max(KEEP_SECONDS, self._cost / KEEP_SHARE)
        return images_left > 0 and time.monotonic() - self._kept >= wait

    def keep(self, rows: Sequence[Row]) -> None:
        """Write the rows that this attempt has finished so far. A failure of the storage is ignored."""
        began = time.monotonic()
        self.done = [*self.done[: self._taken], *rows]
        with suppress(StorageError):  # the shard's own file will raise it again
            self._write()
        self._kept = time.monotonic()
        self._cost = self._kept - began

    def keep_whole(self, rows: Sequence[Row]) -> None:
        """Write all rows of the labeled shard, as `keep` does."""
        self._taken = 0
        self.keep(rows)

    def _write(self) -> None:
        self.noted = time.time()
        content = {
            "starts": self.starts,
            "deaths": dict(self.deaths),
            "current": self.current,
            "driver": self.driver,
            "fresh": self.fresh,
            "noted": self.noted,
            "done": [_packed(row) for row in self.done],
        }
        self.storage.write(self.uri, with_digest(content))


def _packed(row: Row) -> Row:
    """A row with its mask's bytes as text."""
    mask = row["mask"]
    return row if mask is None else row | {"mask": mask | {"bytes": base64.b64encode(mask["bytes"]).decode()}}


def _unpacked(row: Row) -> Row:
    mask = row["mask"]
    return row if mask is None else row | {"mask": mask | {"bytes": base64.b64decode(mask["bytes"])}}


class HungWatch:
    """Exits the process, with a traceback of every thread in its log, unless `progress` is called in time.

    Uses the interpreter's C-level timer: it fires even while a library holds the GIL and never returns.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def progress(self) -> None:
        """Restart the timer."""
        faulthandler.dump_traceback_later(self.seconds, exit=True, file=sys.__stderr__ or sys.stderr)

    def __enter__(self) -> "HungWatch":
        self.progress()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        faulthandler.cancel_dump_traceback_later()


def attempts_file(run_uri: str, shard: int) -> str:
    """The path of a shard's attempts file."""
    return join(run_uri, f"attempts/shard-{shard:06d}.json")


def attempted_shard(name: str) -> int | None:
    """The shard of a file in attempts/, or None if the name is not an attempts file's."""
    match = _NAME.fullmatch(name)
    return None if match is None else int(match[1])


def forget_attempts(storage: Storage, run_uri: str, shard: int) -> None:
    """Remove the attempts file of a committed shard; it may already be gone after a repeated write."""
    try:
        storage.remove(attempts_file(run_uri, shard))
    except FileNotFoundError:
        return
