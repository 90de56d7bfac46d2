"""What the driver of a run shows on its terminal, written to the run folder for `cliper status` elsewhere.

progress.json is rewritten every EVERY seconds while a command labels and removed at its end. It is displayed only:
which shards are done is read from labels/.
"""

import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass

from pydantic import TypeAdapter

from cliper.pipeline.errors import StorageError
from cliper.pipeline.run.folder import Run
from cliper.pipeline.storage.digests import checked, with_digest
from cliper.pipeline.storage.uris import join

FILE = "progress.json"
EVERY = 5.0  # seconds between two writes
STALE = 60.0  # seconds after which a driver counts as gone


@dataclass(frozen=True)
class Heartbeat:
    """The progress of a command at one moment."""

    phase: str  # e.g. "loading the model"
    images: int  # segmented images of the run, those of shards in progress among them
    total: int
    rate: float  # images/s over the last minute
    failed: int  # of this command
    seconds: float  # since the command began to label
    actors: int  # with their model loaded
    written: float = 0.0  # seconds since 1970 by the driver's clock
    host: str = ""

    @property
    def age(self) -> float:
        """Seconds since it was written, by this machine's clock."""
        return max(0.0, time.time() - self.written)


def write_heartbeat(run: Run, beat: Heartbeat) -> None:
    """Write progress.json. A failure of the storage is ignored."""
    content: Mapping[str, object] = asdict(beat) | {"written": time.time(), "host": socket.gethostname()}
    with suppress(StorageError):
        run.storage.write(join(run.uri, FILE), with_digest(content))


def read_heartbeat(run: Run) -> Heartbeat | None:
    """The last heartbeat, or None if there is none, or it is damaged or stale."""
    try:
        beat = TypeAdapter(Heartbeat).validate_python(checked(run.storage.read(join(run.uri, FILE))))
    except (FileNotFoundError, ValueError):  # also pydantic's
        return None
    return beat if beat.age < STALE else None


def end_heartbeat(run: Run) -> None:
    """Remove progress.json."""
    with suppress(StorageError, FileNotFoundError):
        run.storage.remove(join(run.uri, FILE))
