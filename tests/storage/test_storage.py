"""Storage: atomic writes, retries, refusals that name a remedy, secrets that stay secret."""

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cliper.pipeline.errors import StorageError
from cliper.pipeline.storage import retry
from cliper.pipeline.storage import s3 as s3_settings
from cliper.pipeline.storage.backend import Storage
from cliper.pipeline.storage.s3 import s3_options
from tests.conftest import S3Server
from tests.support.faulty_s3 import FaultyS3, written


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    Storage().write(str(target), b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        StorageError, match=f"no space left for {target}; free some and run the same command again"
    ):
        Storage().write(str(target), b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert target.read_bytes() == b"old"


def test_s3_round_trip(s3: S3Server) -> None:
    uri = f"{s3.bucket('roundtrip')}/a/b.bin"
    storage = Storage(s3.options)
    assert not storage.exists(uri)
    storage.write(uri, b"x" * 100)
    assert storage.exists(uri)
    assert storage.read(uri) == b"x" * 100
    assert list(storage.list_files("s3://roundtrip")) == [("a/b.bin", 100)]
    assert storage.read_many([uri, uri, "s3://roundtrip/none"], [None, (10, 15), None])[:2] == [
        b"x" * 100,
        b"x" * 5,
    ]
    storage.remove(uri)
    with pytest.raises(FileNotFoundError):
        storage.read(uri)


def test_listing_pages_through_many_keys(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.bucket("many")
    for i in range(25):
        (s3.folder / "many" / f"{i:02d}").write_bytes(b"")
    monkeypatch.setattr("cliper.pipeline.storage.listing.PAGE", 10)
    assert [name for name, _ in Storage(s3.options).list_files("s3://many")] == [f"{i:02d}" for i in range(25)]


def test_wrong_credentials_and_missing_bucket(s3: S3Server) -> None:
    s3.bucket("private")
    with pytest.raises(StorageError, match="check the credentials"):
        list(Storage(s3.options | {"secret": "wrong"}).list_files("s3://private"))
    with pytest.raises(FileNotFoundError):
        list(Storage(s3.options).list_files("s3://nobucket"))


def test_unreachable_endpoint_fails_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.002)
    options = {"key": "a", "secret": "b", "endpoint_url": "http://127.0.0.1:9"}
    with pytest.raises(StorageError, match="check the endpoint"):
        list(Storage(options).list_files("s3://bucket"))


def test_secrets_are_not_printed() -> None:
    storage = Storage({"secret": "hunter2"})
    assert "hunter2" not in repr(storage) + str(storage)


def test_endpoint_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio:9000")
    assert s3_options({})["endpoint_url"] == "http://minio:9000"
    assert s3_options({"endpoint_url": "http://other"})["endpoint_url"] == "http://other"


# --- faults ----------------------------------------------------------------------------------------------------


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """A server that misbehaves; the client's pauses and time-outs are short, their number is the real one."""
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.002)
    monkeypatch.setitem(s3_settings.CLIENT, "read_timeout", 2)
    with FaultyS3() as server:
        yield server


TRANSIENT = ["503 SlowDown", "429 TooManyRequests", "500 InternalError", "502 BadGateway", "504 X", "reset"]


@pytest.mark.parametrize("kind", [*TRANSIENT, "truncate"])
def test_transient_errors_are_retried(faulty: FaultyS3, kind: str) -> None:
    contents = written(faulty, ["bucket/a", "bucket/b"])
    storage = Storage(faulty.options)
    faulty.fail("GET", "", kind, times=3)
    assert storage.read("s3://bucket/a") == contents["s3://bucket/a"]
    faulty.fail("GET", "bucket/a", kind, times=3)
    assert storage.read_many(list(contents), [None, (3, 9)]) == [
        contents["s3://bucket/a"],
        contents["s3://bucket/b"][3:9],
    ]
    assert faulty.count("GET", "bucket/b") == 1  # only failed requests are retried
    faulty.fail("GET", "list-type", kind, times=3)
    assert [name for name, _ in storage.list_files("s3://bucket")] == ["a", "b"]


@pytest.mark.parametrize("kind", TRANSIENT)
def test_writes_are_retried(faulty: FaultyS3, kind: str) -> None:
    storage = Storage(faulty.options)
    faulty.fail("PUT", "bucket/new", kind, times=3)
    storage.write("s3://bucket/new", b"data")
    assert faulty.objects["bucket/new"] == b"data"
    faulty.fail("DELETE", "bucket/new", kind, times=3)
    storage.remove("s3://bucket/new")
    assert not faulty.objects


@pytest.mark.parametrize("kind", ["503 SlowDown", "reset", "truncate"])
def test_reads_inside_a_parquet_file_are_retried(faulty: FaultyS3, kind: str) -> None:
    buffer = io.BytesIO()
    table = pa.table({"x": list(range(100_000))})
    pq.write_table(table, buffer)
    faulty.objects["bucket/t.parquet"] = buffer.getvalue()
    faulty.fail("GET", "t.parquet", kind, times=3)
    faulty.fail("HEAD", "t.parquet", "503 SlowDown", times=2)
    with Storage(faulty.options).open("s3://bucket/t.parquet") as handle:
        assert pq.read_table(handle).equals(table)


def test_a_stalled_body_is_aborted_and_retried(faulty: FaultyS3) -> None:
    contents = written(faulty, ["bucket/a"])
    faulty.fail("GET", "bucket/a", "stall", times=1)
    assert Storage(faulty.options).read_many(["s3://bucket/a"], [None]) == [contents["s3://bucket/a"]]


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("403 AccessDenied", StorageError, "check the credentials"),
        ("404 NoSuchKey", FileNotFoundError, "NoSuchKey it is"),
        ("404 NoSuchBucket", FileNotFoundError, "NoSuchBucket it is"),
        ("400 InvalidRequest", StorageError, "InvalidRequest it is"),
    ],
)
def test_permanent_errors_are_not_retried(
    faulty: FaultyS3, kind: str, error: type[Exception], message: str
) -> None:
    written(faulty, ["bucket/a", "bucket/b"])
    storage = Storage(faulty.options)
    faulty.fail("GET", "", kind, times=100)
    with pytest.raises(error, match=message):
        storage.read("s3://bucket/a")
    assert faulty.count("GET", "") == 1
    both = (["s3://bucket/a", "s3://bucket/b"], [None, None])
    if error is StorageError and "AccessDenied" in kind:  # a store that refuses all of them is no bad image
        with pytest.raises(StorageError, match=message):
            storage.read_many(*both)
    else:
        assert [type(result).__name__ for result in storage.read_many(*both)] != ["bytes", "bytes"]
    assert faulty.count("GET", "") == 3


def test_the_time_for_retries_is_bounded(faulty: FaultyS3) -> None:
    contents = written(faulty, ["bucket/a", "bucket/b"])
    faulty.fail("GET", "bucket/a", "500 InternalError", times=10**6)
    storage = Storage(faulty.options)
    with pytest.raises(StorageError, match="cannot access s3://bucket/a: OSError: .*InternalError it is"):
        storage.read("s3://bucket/a")
    assert faulty.count("GET", "bucket/a") == retry.ATTEMPTS
    bad, good = storage.read_many(["s3://bucket/a", "s3://bucket/b"], [None, None])
    assert isinstance(bad, OSError)
    assert good == contents["s3://bucket/b"]


def test_no_attempt_starts_late(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds + 50  # as if the attempt itself had stalled

    monkeypatch.setattr(retry.time, "sleep", sleep)
    monkeypatch.setattr(retry.time, "monotonic", lambda: now)
    assert len(list(retry.attempts())) == 3


@pytest.mark.parametrize("kind", ["403 ExpiredToken", "503 SlowDown"])
def test_an_unavailable_store_ends_the_run_instead_of_failing_every_image(faulty: FaultyS3, kind: str) -> None:
    contents = written(faulty, [f"bucket/{i}" for i in range(5)])
    faulty.fail("GET", "", kind, times=10**6)
    with pytest.raises(StorageError, match="cannot access s3://bucket/0"):
        Storage(faulty.options).read_many(list(contents), [None] * 5)


def test_a_full_disk_is_one_line_and_leaves_no_file(full_disk: Path) -> None:
    storage = Storage()
    storage.write(str(full_disk / "run" / "small"), b"x")
    with pytest.raises(StorageError, match=f"no space left for {full_disk}/run/big; free some and run the same"):
        storage.write(str(full_disk / "run" / "big"), b"x" * 2_000_000)
    with (
        pytest.raises(StorageError, match="no space left"),
        storage.create(str(full_disk / "run" / "big")) as handle,
    ):
        handle.write(b"x" * 2_000_000)
    assert [path.name for path in (full_disk / "run").iterdir()] == ["small"]
    assert storage.read(str(full_disk / "run" / "small")) == b"x"


def test_a_local_folder_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **more: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)  # root may write anywhere
    with pytest.raises(StorageError, match="Permission denied; check its owner and mode"):
        Storage().write(str(tmp_path / "run" / "file"), b"")


@pytest.mark.parametrize(
    "uri",
    [
        "simplecache::file:///etc/passwd",
        "filecache::s3://bucket/key",
        "tar://a.jpg::file:///tmp/a.tar",
        "zip://*::http://host/a.zip",
        "github://owner:repo@main/file",
        "git://./",
        "sftp://host/file",
        "reference://x",
        "blockcache::memory://x",
        "dask::file:///etc/passwd",
        "data:text/plain;base64,QQ==://",
    ],
)
def test_schemes_are_an_allow_list(uri: str) -> None:
    """Lists name URIs; what fsspec could chain or fetch besides stores of images is not read."""
    [found] = Storage().read_many([uri], [None])
    assert isinstance(found, StorageError)
    assert "is not read" in str(found)
    with pytest.raises(StorageError, match="is not read"):
        Storage().read(uri)


def test_another_scheme_is_allowed_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CLIPER_SCHEMES", "local, zip")
    (tmp_path / "a").write_bytes(b"here")
    assert Storage().read(f"local://{tmp_path}/a") == b"here"
    with pytest.raises(StorageError, match="is not read"):
        Storage().read(f"simplecache::local://{tmp_path}/a")
