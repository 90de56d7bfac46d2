"""An S3 server that only lists: a bucket of any number of keys that need no disk.

    python -m benchmarks.listing --keys 1000000

lists it as `cliper label` does, writes the manifest and prints one JSON object. A store of files would measure its
own directory walk; this one answers a page of 1,000 keys in about a millisecond.
"""

import argparse
import asyncio
import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Thread

from aiohttp import web

from benchmarks.measure import Stopwatch
from cliper.pipeline.config import InputConfig, ShardConfig
from cliper.pipeline.corpus.manifest import write_manifest
from cliper.pipeline.corpus.sources import list_entries
from cliper.pipeline.storage.backend import Storage

PAGE = 1000
ENTRY = (
    "<Contents><Key>photos/{folder:04d}/{i:09d}.jpg</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
    '<ETag>"0"</ETag><Size>120000</Size><StorageClass>STANDARD</StorageClass></Contents>'
)


def page(keys: int, start: int) -> str:
    """Answer ListObjectsV2 from key number `start` on; the continuation token is the next number."""
    stop = min(keys, start + PAGE)
    more = f"<NextContinuationToken>{stop}</NextContinuationToken>" if stop < keys else ""
    entries = "".join(ENTRY.format(folder=i // PAGE, i=i) for i in range(start, stop))
    return (
        '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult><Name>bucket</Name><Prefix>photos/</Prefix>'
        f"<KeyCount>{stop - start}</KeyCount><MaxKeys>{PAGE}</MaxKeys>"
        f"<IsTruncated>{str(bool(more)).lower()}</IsTruncated>{more}{entries}</ListBucketResult>"
    )


@contextmanager
def listing_server(keys: int) -> Iterator[str]:
    """Serve in a thread; yields the endpoint."""
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event, int]] = Future()

    async def answer(request: web.Request) -> web.Response:
        start = int(request.query.get("continuation-token", "0"))
        return web.Response(text=page(keys, start), content_type="application/xml")

    async def serve() -> None:
        app, stop = web.Application(), asyncio.Event()
        app.router.add_get("/{path:.*}", answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        started.set_result((asyncio.get_running_loop(), stop, runner.addresses[0][1]))
        await stop.wait()
        await runner.cleanup()

    thread = Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    loop, stop, port = started.result(timeout=60)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(timeout=60)


def measure(keys: int) -> dict[str, float]:
    """Seconds and peak memory to list `keys` keys of a bucket into a manifest."""
    watch = Stopwatch()
    with listing_server(keys) as endpoint, tempfile.TemporaryDirectory() as run:
        storage = Storage({"endpoint_url": endpoint, "key": "key", "secret": "secret"})
        with watch.stage("manifest"):
            entries = list_entries(storage, "s3://bucket/photos", InputConfig())
            manifest = write_manifest(entries, storage, run, ShardConfig())
    if manifest.images != keys:
        raise SystemExit(f"{manifest.images} images in the manifest of {keys} keys")
    return {"keys": keys, **watch.result()["manifest"]}


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--keys", type=int, default=1_000_000)
    print(json.dumps(measure(parser.parse_args().keys)))


if __name__ == "__main__":
    main()
