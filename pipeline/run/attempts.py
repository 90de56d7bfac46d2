"""Find the image that kills its process, without trusting the process to say so.

An exception costs one row; a segfault or an out-of-memory kill takes the whole actor, which Ray restarts with
the same shard. So every shard keeps a small file, `attempts/shard-000000.json`, written before the work and
removed with the commit. A shard found to have been started twice before is taken image by image, each named in
the file before it is touched. An image that was named at two deaths is poison: it becomes a row, and the rest
of the shard goes on. Two, because a lost machine must not convict the image it happened to be at. For the same
reason a death counts only under the driver that began the attempt: a driver that is killed takes its actors along.

An image that never ends is made to kill its process, and the rest is as above (`HungWatch`).
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
    """What earlier attempts at a shard left behind, and what this one is doing."""

    storage: Storage
    uri: str
    starts: int = 0
    deaths: Counter[str] = field(default_factory=Counter)
    current: str | None = None  # the image at work, where they are taken one by one
    driver: str = ""  # under which driver `starts` were counted

    @classmethod
    def read(cls, storage: Storage, run_uri: str, shard: int) -> "Attempts | None":
        """The shard's file, or None if nobody is at it, or if it was torn by a crash of the machine."""
        uri = attempts_file(run_uri, shard)
        try:
            found = json.loads(storage.read(uri))
            return cls(storage, uri, found["starts"], Counter(found["deaths"]), found["current"], found["driver"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    @classmethod
    def begin(cls, storage: Storage, run_uri: str, shard: int, driver: str) -> "Attempts":
        """Read the shard's file, charge a death to the image it names, and note this start.

        What another driver began ended with that driver, as far as anyone knows: it charges nobody.
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
        """Whether earlier starts died often enough to go image by image."""
        return self.starts > CAREFUL_AFTER or self.deaths.total() > 0

    def is_poison(self, image_id: str) -> bool:
        """Whether the image was alone at work at too many deaths."""
        return self.deaths[image_id] >= POISON_AFTER

    def note(self, image_id: str | None) -> None:
        """Write down the image about to be touched."""
        self.current = image_id
        content = {"starts": self.starts, "deaths": dict(self.deaths), "current": image_id, "driver": self.driver}
        self.storage.write(self.uri, json.dumps(content).encode())


class HungWatch:
    """Ends the process, with a traceback of every thread in its log, unless `progress` is called in time.

    A timer of the interpreter's own: it fires even while a library holds the lock and never returns.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def progress(self) -> None:
        """Start the time anew."""
        faulthandler.dump_traceback_later(self.seconds, exit=True, file=sys.__stderr__ or sys.stderr)

    def __enter__(self) -> "HungWatch":
        self.progress()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        faulthandler.cancel_dump_traceback_later()


def attempts_file(run_uri: str, shard: int) -> str:
    """The file that counts attempts at a shard."""
    return join(run_uri, f"attempts/shard-{shard:06d}.json")


def attempted_shard(name: str) -> int | None:
    """The shard of a file in attempts/, or None if it is not one of ours."""
    match = _NAME.fullmatch(name)
    return None if match is None else int(match[1])


def forget_attempts(storage: Storage, run_uri: str, shard: int) -> None:
    """Remove the file of a committed shard; a repeated write finds it gone."""
    try:
        storage.remove(attempts_file(run_uri, shard))
    except FileNotFoundError:
        return
