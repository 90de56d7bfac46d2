"""A store that trickles or is down stops the run with one line; one slow object is one failed row."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from cliper.pipeline.corpus.load import Pace, load_entries
from cliper.pipeline.corpus.sources import Entry
from cliper.pipeline.errors import StorageError
from cliper.pipeline.storage import retry
from cliper.pipeline.storage.backend import Storage
from tests.support.faulty_s3 import FaultyS3


@dataclass(frozen=True)
class Trickling(Storage):
    """Objects with "slow" in their name take for ever; `asked` counts the objects of each call."""

    asked: list[int] = field(default_factory=list)

    def read_many(
        self,
        uris: Sequence[str],
        ranges: Sequence[tuple[int, int] | None],
        most: int = 2**40,
        tags: Sequence[str | None] = (),
    ) -> list[bytes | Exception]:
        self.asked.append(len(uris))
        time.sleep(3 * any("slow" in uri for uri in uris))
        return [b"12345"] * len(uris)


IMPATIENT = Pace(seconds=0.2)


def entries(*names: str) -> list[Entry]:
    return [Entry(name, f"s3://b/{name}.jpg", 5) for name in names]


def test_the_time_grows_with_the_size() -> None:
    large = [Entry("a", "s3://b/a", 100_000_000), Entry("b", "s3://b/b")]
    assert Pace(0.2, 1e5).seconds_for(large) == pytest.approx(0.2 + (100_000_000 + 2**20) / 1e5)


def test_one_slow_object_is_one_row() -> None:
    storage = Trickling()
    rows = load_entries(storage, 0, entries("a", "b", "slow", "d"), "image", pace=IMPATIENT).to_pylist()
    assert [row["error_type"] for row in rows] == [None, None, "unreadable", None]
    assert rows[2]["error_message"] == "the store delivers less than 50 kB/s for this image"
    assert storage.asked == [4, 1, 1, 1, 1]


def test_a_slow_store_stops_the_run() -> None:
    storage = Trickling()
    with pytest.raises(
        StorageError, match=r"s3://b/slow2.jpg: the store delivers less than 50 kB/s; the same comm"
    ):
        load_entries(storage, 0, entries(*(f"slow{i}" for i in range(1, 33))), "image", pace=IMPATIENT)
    assert storage.asked == [32, 1, 1]


@pytest.mark.parametrize(("fault", "times"), [("503 SlowDown", 99), ("500 InternalError", 99), ("reset", 99)])
def test_a_store_that_is_down_stops_also_a_shard_of_one(
    fault: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.001)
    with FaultyS3() as store:
        store.objects["b/a.jpg"] = b"12345"
        store.fail("GET", "a.jpg", fault, times)
        with pytest.raises(StorageError, match="cannot access s3://b/a.jpg"):
            load_entries(Storage(store.options), 0, entries("a"), "image")


def test_an_object_that_is_forbidden_is_its_own_matter() -> None:
    with FaultyS3() as store:
        store.objects["b/a.jpg"] = b"12345"
        store.fail("GET", "a.jpg", "403 AccessDenied", 99)
        [row] = load_entries(Storage(store.options), 0, entries("a"), "image").to_pylist()
        assert row["error_type"] == "unreadable"
