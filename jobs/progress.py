"""Progress of a run: a live bar on a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from collections import Counter
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_SECONDS = 5.0


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


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
