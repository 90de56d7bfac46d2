"""Progress of a run: a live bar on a terminal, else a plain line every few seconds."""

import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cliper.model.errors import ConfigError
from cliper.pipeline.config import counted
from cliper.pipeline.errors import TooManyFailuresError
from cliper.pipeline.run.folder import Run
from cliper.pipeline.run.heartbeat import EVERY, Heartbeat, end_heartbeat, write_heartbeat

if TYPE_CHECKING:
    from cliper.pipeline.label.watch import Seen

LINE_SECONDS = 5.0
POLL_SECONDS = 1.0  # between two reads of the actors' notes
RATE_SECONDS = 60.0
HISTORY = round(RATE_SECONDS / POLL_SECONDS) + 1
JUDGED_AFTER = 100  # images: a share of fewer is not meaningful


class RunProgress:
    """Counts committed images and, between commits, the images noted by the actors; shows both on stderr."""

    def __init__(self, total: int, done: int) -> None:
        """`total` images of the run, of which earlier commands finished `done`."""
        self.total, self.before, self.images = total, done, 0
        self.failures: Counter[str] = Counter()
        self.several = 0  # files with more than one page or frame
        self.started = time.monotonic()
        self.actors = 0  # with their model loaded
        self.phase = "starting Ray"
        self._committed: set[int] = set()  # shards of `add` that may still be on the board
        self._at_work: dict[int, tuple[int, int]] = {}  # shard: images segmented, of which failed
        self._history = deque([(self.started, 0)], HISTORY)  # (time, images), the newest last
        self._last_line, self._first_image, self._first = self.started, False, Lock()
        self._bar: Progress | None = None

    @contextmanager
    def watching(self, board: str, run: Run) -> Iterator[None]:
        """Show progress from the actors' notes on `board` until the block ends, also in the run folder."""
        stop = Event()
        self._bar = _bar() if sys.stderr.isatty() else None
        with self._bar or nullcontext():
            if self._bar is not None:
                self._task = self._bar.add_task(self.phase, total=self.total, completed=self.before, note="")
            threads = [
                Thread(target=self._watch, args=(board, stop), daemon=True),
                Thread(target=self._beat, args=(run, stop), daemon=True),
            ]
            for thread in threads:
                thread.start()
            try:
                yield
            finally:
                stop.set()
                for thread in threads:
                    thread.join(timeout=5)
                end_heartbeat(run)

    def enter(self, phase: str) -> None:
        """Begin a phase of the command, e.g. "loading the model"."""
        self.phase = phase
        self._show()

    def add(self, summary: Mapping[str, Any]) -> None:
        """Count one committed shard; `summary` is that of write_shard."""
        self.images += summary["images"]
        self.failures.update(summary["failures"])
        self.several += summary["several"]
        self._committed.add(summary["shard"])
        self._tell_first()
        self._show()

    def see(self, seen: "Seen") -> None:
        """Update the display from the actors' notes."""
        if len(seen.devices) > self.actors:
            self.actors = len(seen.devices)
            device, seconds = seen.devices[-1], seen.model_seconds[-1]
            ready = f"{counted(self.actors, 'actor')} ready"
            self._line(f"{ready}: model loaded in {seconds:.1f} s on {device}")
        committed = set(self._committed)  # a copy: `add` runs in another thread
        self._at_work = {shard: count for shard, count in seen.shards.items() if shard not in committed}
        self._committed -= committed - seen.shards.keys()
        self._tell_first()
        self._show()

    def _tell_first(self) -> None:
        """Print once when the first images are labeled; a note or a commit tells of them."""
        with self._first:
            if self._first_image or not self.labeled:
                return
            self._first_image = True
        self._line(f"first images labeled after {self.seconds:.1f} s")

    @property
    def labeled(self) -> int:
        """Images that this command has segmented so far."""
        at_work = list(self._at_work.items())  # a copy: several threads read and write it
        waiting = sum(done for shard, (done, _) in at_work if shard not in self._committed)
        return min(self.images + waiting, self.total - self.before)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    @property
    def rate(self) -> float:
        """Images per second over the last minute."""
        now = time.monotonic()
        since, images = next(
            (then for then in [*self._history] if now - then[0] <= RATE_SECONDS), self._history[-1]
        )
        return (self.labeled - images) / max(now - since, 1e-9)

    def _watch(self, board: str, stop: Event) -> None:
        from cliper.pipeline.label.watch import clear_board, read_board

        while not stop.wait(POLL_SECONDS):
            self.see(read_board(board))
        self.see(read_board(board))  # a short run ends between two reads
        clear_board(board)

    def _beat(self, run: Run, stop: Event) -> None:
        while True:
            write_heartbeat(run, self.heartbeat())
            if stop.wait(EVERY):
                return

    def heartbeat(self) -> Heartbeat:
        """The progress at this moment, for `cliper status`."""
        phase = "labeling" if self.labeled else self.phase
        done = self.before + self.labeled
        return Heartbeat(phase, done, self.total, self.rate, self.failed, self.seconds, self.actors)

    def _show(self) -> None:
        now = time.monotonic()
        if now - self._history[-1][0] >= POLL_SECONDS:
            self._history.append((now, self.labeled))
        done = self.before + self.labeled
        if self._bar is not None:
            phase = "labeling" if self.labeled else self.phase
            self._bar.update(self._task, description=phase, completed=done, note=self._note())
        elif now - self._last_line >= LINE_SECONDS:
            begun = f"{done}/{self.total} images, {self._note()}"
            self._line(begun if self.labeled else f"{self.phase}, {_clock(self.seconds)} elapsed")

    def _line(self, text: str) -> None:
        self._last_line = time.monotonic()
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    @property
    def failed(self) -> int:
        """Images without a mask so far."""
        return sum(self.failures.values()) + sum(
            bad for shard, (_, bad) in list(self._at_work.items()) if shard not in self._committed
        )

    def _note(self) -> str:
        left = (self.total - self.before - self.labeled) / max(self.rate, 1e-9)
        return f"{self.rate:.1f} images/s, {self.failed} failed, {_clock(self.seconds)} elapsed" + (
            f", {_clock(left)} left" if self.labeled and self.rate else ""
        )


def _clock(seconds: float) -> str:
    """Format a duration as 0:42 or 1:05:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@dataclass(frozen=True)
class FailureLimit:
    """The number of images that may fail in one command: `count` of them, or a `share` between 0 and 1.

    A share is judged once 100 images were labeled, or all that were left. Shards of earlier commands do not count.
    Without either, a command stops if none of its first 100 images has a mask.
    """

    count: int | None = None
    share: float | None = None

    @classmethod
    def parse(cls, text: str) -> "FailureLimit":
        """Parse "50" or "2.5%". Raises ConfigError."""
        try:
            limit = cls(share=float(text[:-1]) / 100) if text.endswith("%") else cls(count=int(text))
        except ValueError:
            limit = cls(count=-1)
        if (limit.count is not None and limit.count < 0) or (
            limit.share is not None and not 0 <= limit.share <= 1
        ):
            raise ConfigError(
                f"--max-failures '{text}': expected a number of images, or a share like 5% up to 100%"
            )
        return limit

    def check(self, progress: RunProgress) -> None:
        """Raise TooManyFailuresError if the limit is exceeded."""
        failed, images = sum(progress.failures.values()), progress.images
        if self.share is None and self.count is None:
            exceeded = JUDGED_AFTER <= images == failed
        elif self.share is None:
            exceeded = self.count is not None and failed > self.count
        else:
            enough = images >= JUDGED_AFTER or progress.before + images >= progress.total
            exceeded = enough and failed > self.share * images
        if exceeded:
            allowed = f"{self.share * 100:g}%" if self.share is not None else str(self.count)
            causes = ", ".join(f"{cause} {count}" for cause, count in progress.failures.most_common())
            if self.share is None and self.count is None:
                raise TooManyFailuresError(
                    f"all of the first {images} images failed ({causes}): something is wrong with all of them; "
                    "`cliper retry` labels them again once it is mended; --max-failures 100% goes on all the same"
                )
            raise TooManyFailuresError(
                f"{failed} of {images} images failed ({causes}), more than --max-failures {allowed}; labeled "
                "shards are kept, and the same command with a higher limit, or none, continues"
            )


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
