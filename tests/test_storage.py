"""Storage: atomic writes, refusals that say what to check, secrets that stay secret."""

import os
from pathlib import Path

import pytest

from pipeline.errors import StorageError
from pipeline.s3 import s3_options
from pipeline.storage import Storage
from tests.conftest import S3Server


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    Storage().write(str(target), b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=f"no space left for {target}; free some and run the same command again"):
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
    monkeypatch.setattr("pipeline.s3.PAGE", 10)
    assert [name for name, _ in Storage(s3.options).list_files("s3://many")] == [f"{i:02d}" for i in range(25)]


def test_wrong_credentials_and_missing_bucket(s3: S3Server) -> None:
    s3.bucket("private")
    with pytest.raises(StorageError, match="check the credentials"):
        list(Storage(s3.options | {"secret": "wrong"}).list_files("s3://private"))
    with pytest.raises(FileNotFoundError):
        list(Storage(s3.options).list_files("s3://nobucket"))


def test_unreachable_endpoint_fails_within_bounds() -> None:
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
