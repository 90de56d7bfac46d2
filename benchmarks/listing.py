"""Listing a corpus into a manifest: seconds, requests and bytes.

    python -m benchmarks.listing [--keys 1000000] [--only keys] [--workers ray]

One million keys in 300 prefixes of a server that only lists, in another process (a store of files would
measure its own directory walk); 200 tars and 200 Parquet files, local and on an S3 server in this process. Every
answer of a server takes 20 ms, as that of a store at some distance. With --workers ray, the tasks of a Ray on this
machine list, and the processor time is that of the driver and, behind the plus, of the tasks. Prints a Markdown
table.
"""

import argparse
import io
import multiprocessing
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.measure import tasks_seconds
from cliper.pipeline.config import InputConfig, ShardConfig
from cliper.pipeline.corpus.left_out import LeftOut
from cliper.pipeline.corpus.manifest import write_listed, write_manifest
from cliper.pipeline.corpus.sources import list_entries, list_tables
from cliper.pipeline.parallel import crew
from cliper.pipeline.storage.backend import Storage
from tests.support.faulty_s3 import FaultyS3

PAGE = 1000
PREFIXES = 300
FILES, IMAGES = 200, 500  # tars or Parquet files, and images in each
DELAY = 0.02  # seconds
ENTRY = (
    "<Contents><Key>photos/{folder:04d}/{i:09d}.jpg</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
    '<ETag>"0"</ETag><Size>120000</Size><StorageClass>STANDARD</StorageClass></Contents>'
)


def page(keys: int, query: dict[str, str]) -> str:
    """Answer ListObjectsV2 over `keys` keys in PREFIXES folders; the continuation token is the next number."""
    per = -(-keys // PREFIXES)
    if query.get("delimiter") and query.get("prefix", "") == "photos/":
        names = (f"<CommonPrefixes><Prefix>photos/{i:04d}/</Prefix></CommonPrefixes>" for i in range(PREFIXES))
        return _result("".join(names), "")
    inside = query.get("prefix", "").split("/")[1]
    if "*" in inside:  # is the pattern the name of something?
        return _result("", "")
    start, end = (int(inside) * per, min(keys, (int(inside) + 1) * per)) if inside else (0, keys)
    if after := query.get("start-after"):
        folder, _, name = after.removeprefix("photos/").partition("/")
        start = int(name.removesuffix(".jpg")) + 1 if name else int(folder) * per
    start = int(query.get("continuation-token", start))
    stop = min(end, start + PAGE)
    more = f"<NextContinuationToken>{stop}</NextContinuationToken>" if stop < end else ""
    return _result("".join(ENTRY.format(folder=i // per, i=i) for i in range(start, stop)), more)


def _result(entries: str, more: str) -> str:
    truncated = f"<IsTruncated>{str(bool(more)).lower()}</IsTruncated>"
    return f"<ListBucketResult><Name>bucket</Name>{truncated}{more}{entries}</ListBucketResult>"


@contextmanager
def listing_server(keys: int) -> Iterator[tuple[str, Any]]:
    """Serve in another process; yields the endpoint, and (requests, bytes) as a shared array."""
    counts, port = multiprocessing.Array("q", 2), multiprocessing.Value("i", 0)
    process = multiprocessing.get_context("fork").Process(target=_serve, args=(keys, counts, port), daemon=True)
    process.start()
    while not port.value:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port.value}", counts
    finally:
        process.kill()
        process.join()


def _serve(keys: int, counts: Any, port: Any) -> None:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            """Answer with one page of the listing."""
            query = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
            time.sleep(DELAY)
            body = page(keys, query).encode()
            with counts.get_lock():
                counts[0] += 1
                counts[1] += len(body)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_HEAD(self) -> None:
            with counts.get_lock():
                counts[0] += 1
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port.value = server.server_port
    server.serve_forever()


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--only", default="", help="measurements whose name contains this")
    parser.add_argument("--workers", choices=["1", "ray"], default="1")
    arguments = parser.parse_args()
    if arguments.workers == "ray":
        _start_ray()
    print("| listed into a manifest | seconds | processor | requests | MB read |\n|---|---:|---:|---:|---:|")
    keys = f"{arguments.keys:,} keys in {PREFIXES} prefixes"
    measurements: dict[str, Callable[[str], None]] = {
        f"{keys}, S3": lambda name: _keys(name, arguments.keys, "s3://bucket/photos"),
        f"glob of {keys}, S3": lambda name: _keys(name, arguments.keys, "s3://bucket/photos/*/*.jpg"),
        "200 tars": lambda name: _files(name, "tar"),
        "200 Parquet files": lambda name: _files(name, "parquet"),
    }
    for name, measure in measurements.items():
        if arguments.only in name:
            measure(name)


def _start_ray() -> None:
    import ray

    ray.init("local", num_cpus=4, include_dashboard=False, object_store_memory=400_000_000, logging_level="error")
    with crew("ray") as workers:
        list(workers.map(str, range(16)))  # starts the processes


def _keys(name: str, keys: int, uri: str) -> None:
    with listing_server(keys) as (endpoint, counts):
        storage = Storage({"endpoint_url": endpoint, "key": "key", "secret": "secret"})
        seconds, processor = _listed(storage, uri, "images", keys)
        _print(name, seconds, processor, counts[0], counts[1])


def _files(name: str, kind: str) -> None:
    with tempfile.TemporaryDirectory() as folder, FaultyS3() as server:
        make = {"tar": _tar, "parquet": _parquet}[kind]
        for i in range(FILES):
            data = make(i)
            (Path(folder) / f"{i:03d}.{kind}").write_bytes(data)
            server.objects[f"bucket/packed/{i:03d}.{kind}"] = data
        _print(f"{name}, local", *_listed(Storage(), folder, kind, FILES * IMAGES), 0, 0)
        server.delay = DELAY
        listed = _listed(Storage(server.options), "s3://bucket/packed", kind, FILES * IMAGES)
        _print(f"{name}, S3", *listed, len(server.requests), server.sent)


def _tar(number: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for i in range(IMAGES):
            member = tarfile.TarInfo(f"{number:03d}-{i:05d}.jpg")
            member.size = 2000
            archive.addfile(member, io.BytesIO(bytes(2000)))
    return buffer.getvalue()


def _parquet(number: int) -> bytes:
    buffer = io.BytesIO()
    ids = [f"{number:03d}-{i:05d}" for i in range(IMAGES)]
    table = pa.table({"image_id": ids, "image": [i.to_bytes(2, "big") * 1000 for i in range(IMAGES)]})
    pq.write_table(table, buffer, row_group_size=100)
    return buffer.getvalue()


def _listed(storage: Storage, uri: str, kind: str, images: int) -> tuple[float, str]:
    """Wall seconds of listing and writing the manifest, and processor seconds."""
    config = InputConfig.model_validate({"format": kind})
    with tempfile.TemporaryDirectory() as run:
        start, processor, tasks = time.perf_counter(), time.process_time(), tasks_seconds()
        if "ray" in sys.modules:
            found = LeftOut()
            with crew("ray") as workers:
                tables = list_tables(storage, uri, config, found, workers)
                manifest = write_listed(tables, Storage(), run, ShardConfig(), workers, lambda count: None, found)
        else:
            manifest = write_manifest(list_entries(storage, uri, config), Storage(), run, ShardConfig())
        taken, used = time.perf_counter() - start, f"{time.process_time() - processor:.1f}"
        used += f" + {tasks_seconds() - tasks:.1f}" if "ray" in sys.modules else ""
    if manifest.images != images:
        raise SystemExit(f"{manifest.images} images in the manifest of {images}")
    return taken, used


def _print(name: str, seconds: float, processor: str, requests: int, read: int) -> None:
    print(f"| {name} | {seconds:.1f} | {processor} | {requests:,} | {read / 1e6:.1f} |", flush=True)


if __name__ == "__main__":
    main()
