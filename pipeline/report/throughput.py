"""The throughput of a run, from the write times of its shard files."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cliper.pipeline.corpus.manifest import Manifest
from cliper.pipeline.run.folder import Run
from cliper.pipeline.run.shards import shard_number
from cliper.pipeline.storage.backend import join

BINS = 48
_PAUSE = 20  # multiples of the usual time between two shards
_SHORTEST_PAUSE = 60.0  # seconds


@dataclass(frozen=True)
class Throughput:
    """Images per second over the working time of a run, without pauses (interruptions)."""

    rates: list[float]  # images/s in bins of equal length
    seconds: float  # working time from the first to the last shard
    images: int  # finished in it
    pauses: int
    paused_seconds: float

    @property
    def mean(self) -> float:
        """Images per second over the whole working time."""
        return self.images / self.seconds


def throughput(run: Run, manifest: Manifest) -> Throughput | None:
    """Read the files' times from one listing; None with fewer than two shards or if a store has no times.

    The first shard only marks the start, because the start of its own work is not recorded. If a run folder is
    copied without preserving times, the times are those of the copy.
    """
    times = finished_times(run)
    if len(times) < 2:
        return None
    counts = np.array([count for part in manifest.parts for count in part.images])
    shards = np.array(sorted(times, key=lambda shard: times[shard]))
    gaps = np.diff(np.array([times[shard] for shard in shards.tolist()]))
    limit = max(_SHORTEST_PAUSE, _PAUSE * float(np.median(gaps)))
    pauses = gaps > limit
    clock = np.cumsum(np.where(pauses, 0.0, gaps))
    if clock[-1] <= 0:
        return None
    return Throughput(
        _rates(clock, counts[shards[1:]]),
        float(clock[-1]),
        int(counts[shards[1:]].sum()),
        int(pauses.sum()),
        float(gaps[pauses].sum()),
    )


def _rates(clock: npt.NDArray[np.float64], images: npt.NDArray[np.int64]) -> list[float]:
    """Images/s in bins; a shard's images are spread over the time since the shard before."""
    done = np.concatenate([[0], np.cumsum(images)])
    edges = np.linspace(0, clock[-1], min(BINS, len(clock)) + 1)
    at_edges = np.interp(edges, np.concatenate([[0.0], clock]), done)
    return (np.diff(at_edges) / np.diff(edges)).tolist()


def finished_times(run: Run) -> dict[int, float]:
    """The write time of each finished shard's file, in epoch seconds, by the store's clock."""
    listed = run.storage.list_stored(join(run.uri, "labels"))
    times = {shard_number(stored.name): stored.modified for stored in listed}
    return {shard: when for shard, when in times.items() if shard is not None and when is not None}
