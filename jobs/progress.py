"""Progress of a run: a live bar on a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from collections import Counter
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cliper.model.errors import ConfigError
from cliper.pipeline.errors import TooManyFailuresError

LINE_SECONDS = 5.0
JUDGED_AFTER = 100  # images: a share of fewer says little


class RunProgress:
    """Counts images as shards are committed, and shows them on stderr."""

    def __init__(self, total: int, done: int) -> None:
        """`total` images of the run, of which `done` were finished before."""
        self.total, self.before, self.images = total, done, 0
        self.failures: Counter[str] = Counter()
        self.started = time.monotonic()
        self._last_line = self.started
        self._bar = _bar() if sys.stderr.isatty() else None

    def __enter__(self) -> "RunProgress":
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("labeling", total=self.total, completed=self.before, note="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def add(self, summary: dict[str, Any]) -> None:
        """Count one committed shard (the summary of sink.write_shard)."""
        self.images += summary["images"]
        self.failures.update(summary["failures"])
        if self._bar is not None:
            self._bar.update(self._task, completed=self.before + self.images, note=self._note())
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            print(f"{self.before + self.images}/{self.total} images, {self._note()}", file=sys.stderr, flush=True)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    def _note(self) -> str:
        rate = self.images / max(self.seconds, 1e-9)
        left = (self.total - self.before - self.images) / max(rate, 1e-9)
        return f"{rate:.1f} images/s, {sum(self.failures.values())} failed, {left:.0f} s left"


@dataclass(frozen=True)
class FailureLimit:
    """How many images of one command may fail: `count` of them, or a `share` between 0 and 1.

    A share is judged once 100 images were labeled, or all that were left. Shards of earlier commands do not count.
    """

    count: int | None = None
    share: float | None = None

    @classmethod
    def parse(cls, text: str) -> "FailureLimit":
        """Read "50" or "2.5%". Raises ConfigError."""
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
        """Raise TooManyFailuresError if more images failed so far."""
        failed, images = sum(progress.failures.values()), progress.images
        if self.share is None:
            exceeded = self.count is not None and failed > self.count
        else:
            enough = images >= JUDGED_AFTER or progress.before + images >= progress.total
            exceeded = enough and failed > self.share * images
        if exceeded:
            allowed = str(self.count) if self.share is None else f"{self.share * 100:g}%"
            causes = ", ".join(f"{cause} {count}" for cause, count in progress.failures.most_common())
            raise TooManyFailuresError(
                f"{failed} of {images} images failed ({causes}), more than --max-failures {allowed}; what was "
                "labeled is kept, and the same command with a higher limit, or none, continues"
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
