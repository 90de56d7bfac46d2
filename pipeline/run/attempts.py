"""Find the image that kills its process, without cooperation of that process.

An exception affects one row; a segfault or an out-of-memory kill ends the whole actor, which Ray restarts with the
same shard. So every shard keeps a small file, `attempts/shard-000000.json`, written before the work and removed
with the commit. If a shard was started twice before, its images are labeled one by one, and each is named in the
file first. An image that is named at two deaths is poison: it becomes a failed row, and the rest of the shard
continues. Two deaths are required because a lost machine must not mark the current image as poison. For the same
reason a death counts only under the driver that started the attempt: a killed driver takes its actors down with
it.

An image that never finishes is made to kill its process, with the same consequences (`HungWatch`).
"""

import faulthandler
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType

from cliper.pipeline.storage.backend import Storage, join

CAREFUL_AFTER = 2  # unfinished starts under one driver
POISON_AFTER = 2  # deaths while the image was alone

_NAME = re.compile(r"shard-(\d{6,})\.json")


@dataclass
class Attempts:
    """The recorded state of a shard in progress: its starts, its deaths by image, and the current image."""

    storage: Storage
    uri: str
    starts: int = 0
    deaths: Counter[str] = field(default_factory=Counter)
    current: str | None = None  # the current image, if they are labeled one by one
    driver: str = ""  # the driver under which `starts` were counted

    @classmethod
    def read(cls, storage: Storage, run_uri: str, shard: int) -> "Attempts | None":
        """Read the shard's file; None if there is none, or if a crash of the machine truncated it."""
        uri = attempts_file(run_uri, shard)
        try:
            found = json.loads(storage.read(uri))
            return cls(storage, uri, found["starts"], Counter(found["deaths"]), found["current"], found["driver"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    @classmethod
    def begin(cls, storage: Storage, run_uri: str, shard: int, driver: str) -> "Attempts":
        """Read the shard's file, count a death for the image it names, and record this start.

        Attempts by another driver are not counted: they may have ended with that driver.
        """
        attempts = cls.read(storage, run_uri, shard) or cls(storage, attempts_file(run_uri, shard))
        if attempts.driver != driver:
            attempts.driver, attempts.starts, attempts.current = driver, 0, None
        attempts.starts += 1
        if attempts.current is not None:
            attempts.deaths[attempts.current] += 1
        attempts.note(None)
        return attempts

    @property
    def careful(self) -> bool:
        """Whether enough earlier starts died to label the images one by one."""
        return self.starts > CAREFUL_AFTER or self.deaths.total() > 0

    def is_poison(self, image_id: str) -> bool:
        """Whether the process died too often while it labeled this image alone."""
        return self.deaths[image_id] >= POISON_AFTER

    def note(self, image_id: str | None) -> None:
        """Record the image that is labeled next."""
        self.current = image_id
        content = {"starts": self.starts, "deaths": dict(self.deaths), "current": image_id, "driver": self.driver}
        self.storage.write(self.uri, json.dumps(content).encode())


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
