"""Keep the rows of labeled shards that wait to be written, so that a stop does not lose them.

An actor returns a labeled shard and goes on with the next; another task writes it. While writing is slow, several
shards wait in memory. Between two windows of images the actor looks for the files of the shards that it labeled
KEEP_SECONDS ago or earlier. If a shard has none, its rows are written to its attempts file (attempts.py), which
takes at most KEEP_SHARE of the time.
"""

import math
import time
from contextlib import suppress

import pyarrow as pa

from cliper.pipeline.errors import StorageError
from cliper.pipeline.run import attempts as kept
from cliper.pipeline.run.attempts import Attempts, forget_attempts
from cliper.pipeline.run.shards import shard_file
from cliper.pipeline.storage.backend import Storage
from cliper.pipeline.storage.uris import join


class Unwritten:
    """The labeled shards of one actor that may not be committed yet."""

    def __init__(self, storage: Storage, run_uri: str) -> None:
        self.storage, self.run_uri = storage, run_uri
        self._waiting: list[tuple[float, Attempts, pa.Table]] = []  # the time to look, oldest first
        self._rest = -math.inf  # the time before which nothing is looked for

    def add(self, attempts: Attempts, labeled: pa.Table) -> None:
        """Remember a labeled shard: a table of schema.COLUMNS."""
        self._waiting.append((time.monotonic() + kept.KEEP_SECONDS, attempts, labeled))

    def look(self) -> None:
        """Keep the rows of shards that have waited too long. A failure of the storage is ignored."""
        began = time.monotonic()
        if began < self._rest or not self._waiting or began < self._waiting[0][0]:
            return
        due = [shard for shard in self._waiting if shard[0] <= began]
        self._waiting = self._waiting[len(due) :]
        # No folder: all are committed. An error of the store will be raised again by the shard's own file.
        with suppress(FileNotFoundError, StorageError):
            at_work = {name for name, _ in self.storage.list_files(join(self.run_uri, "attempts"))}
            for _, attempts, labeled in due:
                if attempts.uri.rpartition("/")[2] in at_work:
                    self._keep(attempts, labeled)
        cost = time.monotonic() - began
        self._rest = time.monotonic() + max(kept.KEEP_SECONDS, cost / kept.KEEP_SHARE)

    def _keep(self, attempts: Attempts, labeled: pa.Table) -> None:
        """Write the rows if the shard has no file; a shard that is labeled again has one.

        If it is committed meanwhile, its attempts file is removed again.
        """
        file = join(self.run_uri, shard_file(attempts.shard))
        if self.storage.exists(file):
            return
        attempts.keep_whole(labeled.to_pylist())
        if self.storage.exists(file):
            forget_attempts(self.storage, self.run_uri, attempts.shard)
