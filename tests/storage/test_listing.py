"""Listings of S3: in the order of keys whatever is listed at the same time, and in few requests."""

import random
import string
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cliper.pipeline.storage import listing, retry
from cliper.pipeline.storage.backend import Storage
from tests.support.faulty_s3 import FaultyS3


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """A server with pages of ten keys."""
    monkeypatch.setattr(listing, "PAGE", 10)
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.002)
    with FaultyS3() as server:
        yield server


def names(server: FaultyS3, uri: str = "s3://bucket/photos") -> list[str]:
    return [name for name, _ in Storage(server.options).list_files(uri)]


def fill(server: FaultyS3, keys: list[str]) -> list[str]:
    server.objects = {f"bucket/photos/{key}": b"x" for key in keys}
    server.requests.clear()
    return sorted(key for key in keys if not key.endswith("/"))


@pytest.mark.parametrize(("folders", "files", "most"), [(1, 300, 34), (40, 8, 60), (300, 1, 70), (8, 100, 110)])
def test_requests_stay_near_the_number_of_pages(store: FaultyS3, folders: int, files: int, most: int) -> None:
    expected = fill(store, [f"f{i:03d}/{j:03d}.jpg" for i in range(folders) for j in range(files)])
    assert names(store) == expected
    assert store.count("GET", "list-type") <= most


def test_many_requests_are_under_way_at_the_same_time(store: FaultyS3) -> None:
    fill(store, [f"f{i:03d}/{j:03d}.jpg" for i in range(40) for j in range(20)])
    store.delay = 0.02
    names(store)
    assert store.most_together > 4


def test_orders_that_mislead(store: FaultyS3) -> None:
    """Folders sort as their names with a slash, and not by characters but by bytes."""
    keys = ["a", "a.jpg", "a/1", "a/2/3", "a0", "ab/1", "B/1", "é/1", "z/", "z/1", "\U0001f600/1", "�/1", "a!/1"]
    more = [f"{key.rstrip('/')}/{i:02d}" for key in keys for i in range(12) if "/" in key]
    expected = fill(store, [*keys, *more])
    assert names(store) == expected


def test_a_store_that_ignores_the_start_is_listed_page_by_page(store: FaultyS3) -> None:
    expected = fill(store, [f"f{i:03d}/{j:03d}.jpg" for i in range(40) for j in range(8)])
    store.ignores_start = True
    assert names(store) == expected


def test_errors_are_retried_inside_ranges_and_a_refusal_ends_the_listing(store: FaultyS3) -> None:
    expected = fill(store, [f"f{i:03d}/{j:03d}.jpg" for i in range(40) for j in range(8)])
    store.fail("GET", "start-after", "503 SlowDown", times=5)
    assert names(store) == expected
    store.fail("GET", "start-after", "403 AccessDenied", times=1)
    with pytest.raises(Exception, match="check the credentials"):
        names(store)


def test_a_listing_that_is_not_finished_leaves_no_thread_behind(store: FaultyS3) -> None:
    expected = fill(store, [f"f{i:03d}/{j:03d}.jpg" for i in range(80) for j in range(20)])
    listed = Storage(store.options).list_files("s3://bucket/photos")
    assert [next(listed)[0] for _ in range(30)] == expected[:30]
    listed.close()  # type: ignore[attr-defined]


PART = st.text(alphabet="ab0.é-", min_size=1, max_size=2)


@settings(max_examples=12, deadline=None)
@given(st.sets(st.lists(PART, min_size=1, max_size=4).map("/".join), max_size=60))
def test_any_tree_is_listed_once_and_in_order(keys: set[str]) -> None:
    with pytest.MonkeyPatch.context() as patch, FaultyS3() as server:
        patch.setattr(listing, "PAGE", 3)
        expected = fill(server, sorted(keys))
        assert names(server) == expected


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("f*/1*.jpg", lambda key: key[4] == "/" and key[5] == "1"),
        ("f00?/*", lambda key: key.startswith("f00")),
        ("f0[12]?/02.jpg", lambda key: key[2] in "12" and key.endswith("02.jpg")),
        ("**/19.jpg", lambda key: key.endswith("19.jpg")),
        ("f001/*", lambda key: key.startswith("f001")),
        ("*/deep/*", lambda key: False),
    ],
)
def test_patterns(store: FaultyS3, pattern: str, wanted: object) -> None:
    assert callable(wanted)
    keys = fill(store, [f"f{i:03d}/{j:02d}.jpg" for i in range(30) for j in range(20)])
    found = [stored.name for stored in Storage(store.options).glob(f"s3://bucket/photos/{pattern}")]
    assert found == [f"bucket/photos/{key}" for key in keys if wanted(key)]


def test_a_pattern_of_many_folders_asks_once_per_folder_and_together(store: FaultyS3) -> None:
    random.seed(0)
    folders = ["".join(random.choices(string.ascii_lowercase, k=6)) for _ in range(60)]
    fill(store, [f"{folder}/x{j}.jpg" for folder in folders for j in range(3)])
    store.delay = 0.01
    assert len(list(Storage(store.options).glob("s3://bucket/photos/*/x*.jpg"))) == 180
    assert store.count("GET", "list-type") <= 60 + 7
    assert store.most_together > 4
