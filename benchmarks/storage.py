"""Processor time of S3 clients per object: s3fs, pyarrow.fs, obstore alone, and `Storage`, which a run uses.

    python -m benchmarks.storage --objects 300

Starts `rclone serve s3` (extra `test`) in a process of its own and prints a Markdown table: milliseconds of this
process per object, for the best of three passes, so that neither the server nor other processes count.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cliper.pipeline.storage.backend import Storage
from cliper.pipeline.storage.direct import direct_s3
from cliper.pipeline.storage.s3 import s3_options
from tests.conftest import S3Server

SIZES = (1_000, 200_000)
PASSES = 3
Write = Callable[[str, bytes], Any]
Read = Callable[[str], Any]


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--objects", type=int, default=300)
    count = parser.parse_args().objects
    with tempfile.TemporaryDirectory() as folder:
        server = S3Server(Path(folder))
        try:
            server.bucket("bucket")
            _table(server, count)
        finally:
            server.process.kill()
            server.process.wait()


def _table(server: S3Server, count: int) -> None:
    heads = ["ms per object", *(f"{verb} {size // 1000} kB" for size in SIZES for verb in ("write", "read"))]
    heads.append("list, per key")
    print(f"| {' | '.join(heads)} |\n|---|{'---:|' * (len(heads) - 1)}")
    for name, (write, read, listing) in _clients(server).items():
        cells = [_cost(work, count) for size in SIZES for work in _work(write, read, count, size)]
        print(f"| {name} | {' | '.join([*cells, _cost(listing, len(SIZES) * count, digits=3)])} |", flush=True)


def _work(write: Write, read: Read, count: int, size: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Write `count` objects, and read them."""
    keys, data = [f"bucket/{size}/{i}" for i in range(count)], os.urandom(size)
    return lambda: [write(key, data) for key in keys], lambda: [read(key) for key in keys]


def _cost(work: Callable[[], Any], count: int, digits: int = 2) -> str:
    """Milliseconds of processor time per object; the error's first words if the client fails."""
    try:
        return f"{1000 * min(_processor_seconds(work) for _ in range(PASSES)) / count:.{digits}f}"
    except Exception as error:
        return " ".join(str(error).split()[-2:])


def _processor_seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def _clients(server: S3Server) -> dict[str, tuple[Write, Read, Callable[[], Any]]]:
    storage = Storage(server.options)
    s3fs, _ = storage.filesystem("s3://bucket")
    return {
        "s3fs": (s3fs.pipe_file, s3fs.cat_file, lambda: s3fs.find("bucket", detail=True)),
        "pyarrow.fs": _pyarrow(server),
        "obstore": _obstore(server),
        "`Storage`": (
            lambda key, data: storage.write(f"s3://{key}", data),
            lambda key: storage.read(f"s3://{key}"),
            lambda: list(storage.list_files("s3://bucket")),
        ),
    }


def _obstore(server: S3Server) -> tuple[Write, Read, Callable[[], Any]]:
    import obstore

    client = direct_s3(s3_options(server.options), "bucket/x", lambda: None)
    assert client is not None
    store = client.settings.store()

    def listed() -> Sequence[Any]:
        return [found for page in obstore.list(store) for found in page]

    return (
        lambda key, data: obstore.put(store, key.removeprefix("bucket/"), data),
        lambda key: obstore.get(store, key.removeprefix("bucket/")).bytes().to_bytes(),
        listed,
    )


def _pyarrow(server: S3Server) -> tuple[Write, Read, Callable[[], Any]]:
    from pyarrow.fs import FileSelector, S3FileSystem

    files = S3FileSystem(
        access_key=server.key, secret_key=server.secret, endpoint_override=server.endpoint, region="us-east-1"
    )

    def write(key: str, data: bytes) -> None:
        with files.open_output_stream(key) as stream:
            stream.write(data)

    def read(key: str) -> bytes:
        with files.open_input_stream(key) as stream:
            return stream.read()

    return write, read, lambda: files.get_file_info(FileSelector("bucket", recursive=True))


if __name__ == "__main__":
    main()
