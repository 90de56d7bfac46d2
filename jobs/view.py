"""`cliper view`: a local page that shows all images of a run."""

from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Annotated
from urllib.parse import parse_qsl, urlsplit

import typer

from cliper.jobs.serve import check_address
from cliper.jobs.serve_guard import is_own
from cliper.jobs.storage_options import StorageOption, parse_options
from cliper.model.errors import CliperError
from cliper.pipeline.errors import ImageError
from cliper.pipeline.report.browse import Browser, Query

Opt = typer.Option
Answer = tuple[int, str, bytes]  # status, content type, body

_ROWS = 2_000_000
_HEADERS = {
    # The page is one file: nothing is loaded, and nothing that an image or a name contains is executed elsewhere.
    "Content-Security-Policy": (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
# Files that a browser shows as images; everything else is downloaded, whatever its name says.
_KINDS = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG": "image/png", b"GIF8": "image/gif", b"BM": "image/bmp"}
_SECONDS = 30.0  # for a request to arrive


def view(
    run: Annotated[str, typer.Argument(help="Run folder: local path or s3:// prefix", metavar="RUN")],
    port: Annotated[int, Opt(min=1, max=65535, help="Port on 127.0.0.1")] = 7861,
    sample: Annotated[int, Opt(min=1, help="Rows to read at most; of a larger run, shards at random")] = _ROWS,
    storage_option: StorageOption = None,
) -> None:
    """Open a page of this machine with all images of a run: filter, sort, enlarge, page by page.

    Works on unfinished runs, whose finished shards are read once at the start. Images and masks are rendered when
    a page is asked for. Only browsers on this machine are answered.
    """
    from cliper.pipeline.run.folder import read_run
    from cliper.pipeline.storage.backend import Storage

    check_address("127.0.0.1", port)
    opened = read_run(run, Storage(parse_options(storage_option or [])))
    print(f"reading   {opened.uri}", flush=True)
    browser = Browser(opened, sample)
    with make_server(browser, port) as server:
        print(f"serving   http://127.0.0.1:{port}, {browser.images} images (Ctrl-C stops)", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()


def make_server(browser: Browser, port: int) -> ThreadingHTTPServer:
    """A server of `answer` on this machine's own address; port 0 takes a free one."""
    server = ThreadingHTTPServer(("127.0.0.1", port), _handler(lambda path: answer(browser, path)))
    server.daemon_threads = True
    return server


def answer(browser: Browser, path: str) -> Answer:
    """The page of a search (`/?...`), or the file of a row (`/file/ROW`)."""
    parts = urlsplit(path)
    try:
        if parts.path == "/":
            page = browser.page(Query.parse(dict(parse_qsl(parts.query))))
            return 200, "text/html; charset=utf-8", page.encode()
        folder, _, number = parts.path.rpartition("/")
        if folder == "/file" and number.isdecimal() and len(number) < 12:
            data = browser.file(int(number))
            return 200, _kind(data), data
    except ImageError as error:
        return 404, "text/plain; charset=utf-8", str(error).encode()
    except CliperError as error:  # a damaged file, or a store that is down: the next request may succeed
        return 500, "text/plain; charset=utf-8", str(error).encode()
    return 404, "text/plain; charset=utf-8", b"There is no such page."


def _kind(data: bytes) -> str:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return next((kind for start, kind in _KINDS.items() if data.startswith(start)), "application/octet-stream")


def _handler(reply: Callable[[str], Answer]) -> type[BaseHTTPRequestHandler]:
    """A handler that answers GET requests of this machine's own pages with `reply(path)`."""

    class Handler(BaseHTTPRequestHandler):
        timeout = _SECONDS

        def do_GET(self) -> None:
            """Answer the page of this server with a part of it, and any other with 403."""
            status, kind, body = 403, "text/plain", b"This request does not come from the page of this server."
            if is_own(self.headers["Host"], self.headers["Origin"], ("localhost",)):
                status, kind, body = reply(self.path)
            with suppress(ConnectionError):  # the browser has gone on
                self.send_response(status)
                for name, value in (_HEADERS | {"Content-Type": kind, "Content-Length": str(len(body))}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Requests are not logged."""

    return Handler
