"""The storage and corpus of a scenario, and the count of its rows."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cliper.pipeline.corpus.decode import decode
from cliper.pipeline.run.folder import Run, read_run
from cliper.pipeline.run.leftovers import clean_run
from cliper.pipeline.run.masks import unpack_mask
from cliper.pipeline.run.rows import read_tables
from cliper.pipeline.run.verify import verify_run
from cliper.pipeline.storage.backend import Storage
from cliper.pipeline.storage.uris import join
from tests.conftest import S3Server
from tests.support.fakes import brightness_labels, write_corpus

COLUMNS = ("image_id", "width", "height", "mask", "mask_codec", "status", "error_type", "attempts")


@dataclass(frozen=True)
class Place:
    """A storage: `root` as passed to commands, and `folder`, the same files on this machine."""

    name: str
    root: str
    folder: Path
    options: dict[str, str] = field(default_factory=dict)  # of the storage; nodes do not share an environment

    def corpus(self, images: int, extra: Mapping[str, bytes] = {}) -> dict[str, bytes]:
        """Write the corpus `corpus-IMAGES` if it is not there, and return name -> content."""
        contents = write_corpus(self.folder / f"corpus-{images}", images)
        for name, data in extra.items():
            path = self.folder / f"corpus-{images}" / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
        return contents | dict(extra)

    def open(self, name: str) -> Run:
        """The run `name` at this place."""
        return read_run(join(self.root, name), Storage(self.options))


def local_place(folder: Path) -> Place:
    """This machine's disk."""
    folder.mkdir(parents=True, exist_ok=True)
    return Place("local", str(folder), folder)


@contextmanager
def s3_place(folder: Path) -> Iterator[Place]:
    """A bucket of a real S3 server (rclone) for the length of the context."""
    folder.mkdir(parents=True, exist_ok=True)
    server = S3Server(folder)
    try:
        yield Place("s3", server.bucket("bucket"), folder / "bucket", server.options)
    finally:
        server.process.kill()
        server.process.wait()


@dataclass(frozen=True)
class Count:
    """Rows against the corpus. `wrong`: ids with an unexpected status, reason or mask; `problems`: those
    reported by `cliper verify --clean`; `orphans`: leftovers that it removed."""

    images: int
    lost: list[str]
    doubled: list[str]
    wrong: list[str]
    problems: list[str]
    orphans: int

    @property
    def clean(self) -> bool:
        """No row is lost, doubled or changed, and `cliper verify` finds no problem."""
        return not (self.lost or self.doubled or self.wrong or self.problems)


Expected = Mapping[str, tuple[str, str]]  # image_id -> (status, error_type, or the mask's hash)


def brightness_of(contents: Mapping[str, bytes]) -> Expected:
    """The expected rows of an undisturbed run with the segmenters of driver.py, computed without the flow."""
    return {name: ("ok", _hash(brightness_labels(decode(data, 10**8).pixels))) for name, data in contents.items()}


def written(run: Run) -> list[tuple[str, tuple[str, str]]]:
    """(image_id, (status, error_type or the mask's hash)) of every row in every shard file."""
    return [_summary(row) for table in read_tables(run, COLUMNS) for row in table.to_pylist()]


def count(run: Run, expected: Expected) -> Count:
    """Compare a run's rows with the expected ones, id by id."""
    rows = written(run)
    times = Counter(image_id for image_id, _ in rows)
    wrong = [image_id for image_id, found in rows if found != expected.get(image_id)]
    doubled = [image_id for image_id, n in times.items() if n > 1]
    orphans = len(list(clean_run(run)))
    problems = [f"{problem.kind}: {problem.file}: {problem.detail}" for problem in verify_run(run, 1).problems]
    return Count(len(expected), sorted(set(expected) - set(times)), doubled, wrong, problems, orphans)


def _summary(row: dict[str, Any]) -> tuple[str, tuple[str, str]]:
    known = _hash(unpack_mask(row)) if row["status"] == "ok" else row["error_type"]
    return row["image_id"], (row["status"], known)


def _hash(labels: Any) -> str:
    return hashlib.sha256(labels.tobytes()).hexdigest()[:16]
