"""Listing and loading cost few requests, counted by the server; a bad object costs a bounded time and one row."""

import io
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cliper.pipeline.config import InputConfig, ShardConfig
from cliper.pipeline.corpus.load import load_entries
from cliper.pipeline.corpus.sources import Entry, list_entries
from cliper.pipeline.storage import web
from cliper.pipeline.storage.backend import Storage
from tests.corpus.test_tars import tar
from tests.support.cutting import shards_of
from tests.support.fakes import jpeg
from tests.support.faulty_s3 import FaultyS3


def test_listing_tars_of_large_members_reads_their_headers() -> None:
    data = tar([(f"{i:03d}.jpg", bytes(200_000)) for i in range(40)])
    with FaultyS3() as server:
        server.objects.update({f"b/tars/{i}.tar": data for i in range(5)})
        entries = list(list_entries(Storage(server.options), "s3://b/tars", InputConfig(format="tar")))
        assert len(entries) == 200
        assert server.sent < 0.02 * 5 * len(data)
        assert len(server.requests) <= 5 * 43


def test_listing_tars_of_small_members_takes_few_requests() -> None:
    data = tar([(f"{i:04d}.jpg", bytes(2_000)) for i in range(1000)])
    with FaultyS3() as server:
        server.objects["b/a.tar"] = data
        entries = list(list_entries(Storage(server.options), "s3://b/a.tar", InputConfig()))
        assert len(entries) == 1000
        assert len(server.requests) < 40
        assert server.sent < 1.2 * len(data)


def parquet(images: list[bytes], group: int) -> bytes:
    buffer = io.BytesIO()
    column = [{"bytes": data, "path": None} for data in images]
    captions = [os.urandom(500).hex() for _ in images]
    pq.write_table(
        pa.table({"image": column, "caption": captions}), buffer, row_group_size=group, compression="none"
    )
    return buffer.getvalue()


@pytest.mark.parametrize("group", [64, 256, 1024])
def test_row_groups_of_images_are_read_once(group: int) -> None:
    images = [os.urandom(5_000) for _ in range(1024)]
    with FaultyS3() as server:
        server.objects["b/p/a.parquet"] = parquet(images, group)
        storage = Storage(server.options)
        entries = list(list_entries(storage, "s3://b/p", InputConfig(format="parquet")))
        shards = list(shards_of(entries, ShardConfig(images=128)))
        server.sent, server.requests = 0, []
        found = [row for shard in shards for row in load_entries(storage, 0, shard, "image")["data"].to_pylist()]
        assert found == images
        assert server.sent < 1.15 * sum(map(len, images))
        assert len(server.requests) <= 5 * len(shards) + 2 * len(images) // group


def test_shards_of_parquet_images_keep_to_the_megabytes() -> None:
    entries = [Entry(str(i), "a.parquet", 2**20, row=i, group=i // 4) for i in range(40)]
    sizes = [len(shard) for shard in shards_of(entries, ShardConfig(images=100, megabytes=8))]
    assert sizes == [8] * 5
    large = [Entry(str(i), "a.parquet", 2**20, row=i, group=0) for i in range(40)]
    assert [len(shard) for shard in shards_of(large, ShardConfig(images=100, megabytes=8))] == [8] * 5
    assert [len(shard) for shard in shards_of(large, ShardConfig(images=100, megabytes=10))] == [40]


class _Web(BaseHTTPRequestHandler):
    """A server: /large never ends, /busy is never ready, /ranges ignores ranges, any other path is a photo."""

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self.send_response(503 if self.path == "/busy" else 404 if self.path == "/gone" else 200)
        self.end_headers()
        if self.path == "/large":
            while True:
                try:
                    self.wfile.write(bytes(1 << 16))
                except OSError:
                    return
        self.wfile.write(jpeg(1))


@pytest.fixture
def site() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Web)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_dead_hosts_and_endless_objects_are_rows(
    site: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("cliper.pipeline.storage.retry.FIRST_PAUSE", 0.01)
    dead = ["http://127.0.0.1:9/a.jpg", "http://no-such-host.invalid/b.jpg", f"{site}/busy"]
    (tmp_path / "list.txt").write_text("\n".join([f"{site}/photo.jpg", *dead, f"{site}/large", f"{site}/gone"]))
    entries = list(list_entries(Storage(), str(tmp_path / "list.txt"), InputConfig()))
    start = time.monotonic()
    rows = load_entries(Storage({"anon": True}), 0, entries, "image", most=1 << 20).to_pylist()
    assert time.monotonic() - start < web.LAST_START + web.SILENCE
    assert rows[0]["data"] == jpeg(1)
    assert [row["error_type"] for row in rows[1:]] == [*["unreadable"] * 3, "oversized", "missing"]
    alone = load_entries(Storage(), 0, entries[1:4], "image").to_pylist()
    assert [row["error_type"] for row in alone] == ["unreadable"] * 3


def test_a_web_server_without_ranges_gives_the_member(site: str) -> None:
    entry = Entry("a", f"{site}/ranges", 10, offset=5)
    assert load_entries(Storage(), 0, [entry], "image")["data"].to_pylist() == [jpeg(1)[5:15]]


def test_special_files_are_rows_and_never_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "large.jpg").write_bytes(bytes(3000))
    (tmp_path / "good.jpg").write_bytes(jpeg(1))
    names = ["pipe.jpg", "/dev/zero", "large.jpg", "good.jpg", "."]
    (tmp_path / "list.txt").write_text("\n".join(names))
    entries = list(list_entries(Storage(), str(tmp_path / "list.txt"), InputConfig()))
    rows = load_entries(Storage(), 0, entries, "image", most=2000).to_pylist()
    assert [row["error_type"] for row in rows] == ["unreadable", "unreadable", "oversized", None, "unreadable"]
    known = [Entry("a", str(tmp_path / "large.jpg"), 3000)]
    [row] = load_entries(Storage(), 0, known, "image", most=2000).to_pylist()
    assert row["error_message"] == "3,000 bytes; an image file may have 2,000 bytes"


def test_objects_of_unknown_size_on_s3() -> None:
    with FaultyS3() as server:
        server.objects.update({"b/empty.jpg": b"", "b/good.jpg": jpeg(1), "b/large.jpg": bytes(5000)})
        entries = [Entry(name, f"s3://b/{name}.jpg") for name in ("empty", "good", "large", "gone")]
        rows = load_entries(Storage(server.options), 0, entries, "image", most=3000).to_pylist()
    assert [row["data"] for row in rows[:2]] == [b"", jpeg(1)]
    assert [row["error_type"] for row in rows] == [None, None, "oversized", "missing"]
