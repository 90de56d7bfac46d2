"""An HTTP proxy in front of an S3 server that breaks a seeded share of the requests.

The Host header goes through unchanged, because the request's signature covers it.
"""

import asyncio
import random
import socket
import struct
import threading
from collections import Counter
from concurrent.futures import Future
from contextlib import suppress
from types import TracebackType

from aiohttp import ClientSession, ClientTimeout, TCPConnector, web
from yarl import URL

FAULTS = ("slow_down", "reset", "answer_lost", "stall", "truncated")
STALL_SECONDS = 300.0  # far longer than any client of a test waits
HOP_BY_HOP = ("connection", "keep-alive", "transfer-encoding", "upgrade", "te", "trailer", "expect")
SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your rate.</Message></Error>"


class FlakyProxy:
    """Serves at `endpoint` in a thread until it is closed; `injected` counts faults, `requests` all requests.

    slow_down: 503 without contacting the server. reset: TCP reset without contacting the server. answer_lost: TCP
    reset after the server has executed the request. stall: no answer. truncated: fewer bytes than Content-Length
    (an answer without a body is reset instead). Files of paths with `slow` in them arrive at a byte per second;
    `trickled` counts these answers.
    """

    def __init__(
        self, upstream: str, rate: float, seed: int, faults: tuple[str, ...] = FAULTS, slow: str | None = None
    ) -> None:
        self.upstream, self.rate, self.faults, self.slow = upstream, rate, faults, slow
        self.trickled = 0
        self.random = random.Random(seed)
        self.injected: Counter[str] = Counter()
        self.requests = 0
        self._started: Future[int] = Future()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def __enter__(self) -> "FlakyProxy":
        self._thread.start()
        self.endpoint = f"http://127.0.0.1:{self._started.result(timeout=60)}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(timeout=60)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        timeout = ClientTimeout(total=None, sock_read=120)
        connector = TCPConnector(limit=100, force_close=True)
        async with ClientSession(timeout=timeout, auto_decompress=False, connector=connector) as self._client:
            app = web.Application(client_max_size=2**30)
            app.router.add_route("*", "/{path:.*}", self._handle)
            runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self._started.set_result(site._server.sockets[0].getsockname()[1])  # type: ignore[union-attr]
            await self._stop.wait()
            await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.requests += 1
        fault = self.random.choice(self.faults) if self.random.random() < self.rate else None
        if fault:
            self.injected[fault] += 1
        body = await request.read()
        if fault == "slow_down":
            return web.Response(status=503, body=SLOW_DOWN, content_type="application/xml")
        if fault == "stall":
            await asyncio.sleep(STALL_SECONDS)
        if fault in ("reset", "stall"):
            return _reset(request)
        headers = [(k, v) for k, v in request.headers.items() if k.lower() not in HOP_BY_HOP]
        url = URL(self.upstream + request.raw_path, encoded=True)
        async with self._client.request(
            request.method, url, headers=headers, data=body or None, allow_redirects=False
        ) as answer:
            content = await answer.read()
            if self.slow is not None and request.method == "GET" and self.slow in request.path:
                self.trickled += 1
                return await _trickle(request, answer.status, list(answer.headers.items()), content)
            return await _answer(request, answer.status, list(answer.headers.items()), content, fault)


async def _trickle(
    request: web.Request, status: int, headers: list[tuple[str, str]], content: bytes
) -> web.StreamResponse:
    response = _begun(status, headers)
    response.content_length = len(content)
    await response.prepare(request)
    for place in range(len(content)):
        await response.write(content[place : place + 1])
        await asyncio.sleep(1)
    return response


async def _answer(
    request: web.Request, status: int, headers: list[tuple[str, str]], content: bytes, fault: str | None
) -> web.StreamResponse:
    if fault == "answer_lost" or (fault == "truncated" and not content):
        return _reset(request)
    response = _begun(status, headers)
    if request.method != "HEAD":
        response.content_length = len(content)
    await response.prepare(request)
    if request.method == "HEAD":
        return response
    await response.write(content[: len(content) // 2] if fault == "truncated" else content)
    if fault == "truncated" and request.transport is not None:
        await asyncio.sleep(0.05)  # for sent data to arrive
        request.transport.close()
    with suppress(ConnectionError):
        await response.write_eof()
    return response


def _begun(status: int, headers: list[tuple[str, str]]) -> web.StreamResponse:
    response = web.StreamResponse(status=status)
    for name, value in headers:
        if name.lower() not in HOP_BY_HOP:
            response.headers.add(name, value)
    return response


def _reset(request: web.Request) -> web.Response:
    """Close with a TCP reset, not an orderly end."""
    if request.transport is not None:
        connection = request.transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.transport.abort()
    return web.Response(status=500)
