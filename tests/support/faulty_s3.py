"""A small S3 server in memory that honors conditions as AWS does and fails on demand; accepts any key."""

import hashlib
import socket
import ssl
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


@dataclass
class Fault:
    """A fault for the next `times` requests of `method` whose path contains `part`."""

    method: str
    part: str
    kind: str  # an error like "503 SlowDown", or "reset", "truncate", "stall", "lost answer"
    times: int


class FaultyS3:
    """Serves until the block ends. `requests` lists method and path of each request; `sent` counts the bytes."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.sent = 0
        self.delay = 0.0  # seconds before every answer
        self.together = self.most_together = 0  # requests under way
        self.ignores_start = False  # StartAfter of listings has no effect
        self.headers: dict[str, str] = {}  # sent with every answer
        self.lock = threading.Lock()
        self._faults: list[Fault] = []
        handler = type("Handler", (_Handler,), {"store": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self.options = {"key": "KEY", "secret": "SECRET", "endpoint_url": self.endpoint}

    def __enter__(self) -> "FaultyS3":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def encrypt(self, context: ssl.SSLContext) -> None:
        """Speak TLS from now on."""
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)

    def fail(self, method: str, part: str, kind: str, times: int) -> None:
        """Make the next `times` requests of `method` for paths with `part` fail."""
        self._faults.append(Fault(method, part, kind, times))

    def forgive(self, method: str) -> None:
        """No more faults for `method`."""
        self._faults = [fault for fault in self._faults if fault.method != method]

    def next_fault(self, method: str, path: str) -> str:
        with self.lock:
            self.requests.append((method, path))
            for fault in self._faults:
                if fault.method == method and fault.part in path and fault.times:
                    fault.times -= 1
                    return fault.kind
        return ""

    def struck(self) -> bool:
        """Whether every requested fault has happened."""
        return all(not fault.times for fault in self._faults)

    def count(self, method: str, part: str) -> int:
        return sum(m == method and part in path for m, path in self.requests)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes; the second must not wait for the first
    store: FaultyS3

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve("GET", lambda key: self._list() if "list-type=2" in self.path else self._get(key))

    def do_HEAD(self) -> None:
        self._serve("HEAD", self._get)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._serve("PUT", lambda key: self._put(key, body))

    def do_DELETE(self) -> None:
        self._serve("DELETE", self._delete)

    def _serve(self, method: str, answer: Any) -> None:
        with self.store.lock:
            self.store.together += 1
            self.store.most_together = max(self.store.together, self.store.most_together)
        try:
            self._serve_one(method, answer)
        finally:
            with self.store.lock:
                self.store.together -= 1

    def _serve_one(self, method: str, answer: Any) -> None:
        time.sleep(self.store.delay)
        key = unquote(urlsplit(self.path).path).lstrip("/")
        self.kind = self.store.next_fault(method, self.path)
        if self.kind[:3].isdigit():
            status, code = self.kind.split()
            self._error(int(status), code)
        elif self.kind == "reset":
            self._reset()
        else:
            answer(key)

    def _get(self, key: str) -> None:
        data = self.store.objects.get(key)
        if data is None:
            self._error(404, "NoSuchKey")
            return
        whole, wanted = data, self.headers.get("Range")
        headers = {"ETag": _etag(whole)}
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            data = data[int(first) : int(last) + 1 if last else None]
            if not data:
                self._error(416, "InvalidRange")
                return
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(data) - 1}/{len(whole)}"
        self._answer(206 if wanted else 200, data, **headers)

    def _put(self, key: str, body: bytes) -> None:
        if self.headers.get("x-amz-content-sha256", "").startswith("STREAMING"):
            raise NotImplementedError("chunked uploads")
        with self.store.lock:
            found = self.store.objects.get(key)
            create, match = self.headers.get("If-None-Match"), self.headers.get("If-Match")
            refused = (create and found is not None) or (match and (found is None or match != _etag(found)))
            if not refused:
                self.store.objects[key] = body
        if self.kind == "lost answer":
            self._reset()
        elif refused:
            self._error(
                412 if found is not None else 404, "PreconditionFailed" if found is not None else "NoSuchKey"
            )
        else:
            self._answer(200, b"", ETag=_etag(body))

    def _delete(self, key: str) -> None:
        self.store.objects.pop(key, None)
        self._answer(204, b"")

    def _list(self) -> None:
        query = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        bucket, prefix = urlsplit(self.path).path.strip("/"), query.get("prefix", "")
        after = "" if self.store.ignores_start else query.get("start-after", "")
        after = bytes.fromhex(query.get("continuation-token", "")).decode() or after
        inside = (
            key.removeprefix(f"{bucket}/") for key in sorted(self.store.objects) if key.startswith(f"{bucket}/")
        )
        names = [
            _folder_or_key(name, prefix, query.get("delimiter")) for name in inside if name.startswith(prefix)
        ]
        names = [name for name in dict.fromkeys(names) if name > after]
        page = names[: int(query.get("max-keys", 1000))]
        body = "".join(map(partial(self._listed, bucket, bool(query.get("delimiter"))), page))
        more = f"<NextContinuationToken>{page[-1].encode().hex()}</NextContinuationToken>" if page != names else ""
        body += f"<IsTruncated>{str(bool(more)).lower()}</IsTruncated>{more}"
        self._answer(200, f"<ListBucketResult>{body}</ListBucketResult>".encode())

    def _listed(self, bucket: str, delimited: bool, name: str) -> str:
        data = self.store.objects.get(f"{bucket}/{name}")
        if delimited and data is None:
            return f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
        data = data or b""
        return (
            f"<Contents><Key>{escape(name)}</Key><Size>{len(data)}</Size><ETag>{escape(_etag(data))}</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
        )

    def _error(self, status: int, code: str) -> None:
        self._answer(status, f"<Error><Code>{code}</Code><Message>{code} it is</Message></Error>".encode())

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in (headers | self.store.headers).items():
            self.send_header(name, value)
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        with self.store.lock:
            self.store.sent += len(body)
        if self.kind in ("truncate", "stall"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if self.kind == "stall":
                time.sleep(60)
            self._reset()
            return
        self.wfile.write(body)

    def _reset(self) -> None:
        """Close with a TCP reset instead of an orderly end."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


def _folder_or_key(name: str, prefix: str, delimiter: str | None) -> str:
    if not delimiter or delimiter not in name[len(prefix) :]:
        return name
    return prefix + name[len(prefix) :].partition(delimiter)[0] + delimiter


@lru_cache(maxsize=32)
def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


def written(server: FaultyS3, keys: Sequence[str], size: int = 1000) -> dict[str, bytes]:
    """Put an object of `size` bytes under each key; returns URI -> content."""
    contents = {f"s3://{key}": hashlib.sha256(key.encode()).digest() * (size // 32 + 1) for key in keys}
    server.objects.update({uri.removeprefix("s3://"): data for uri, data in contents.items()})
    return contents
