"""Objects of web servers: every host on its own, so that a dead one fails its own objects after a bounded time."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import fsspec
from fsspec.asyn import sync

from cliper.pipeline.storage.local import too_large
from cliper.pipeline.storage.retry import fetch_with_retries

TOGETHER = 32  # requests at the same time
ATTEMPTS = 4
LAST_START = 30.0  # seconds after the first attempt, when the last one may begin
CONNECT, SILENCE, WHOLE = 10, 30, 300  # seconds: to connect, without a byte, for one object
_CHUNK = 1 << 20
_OWN_OPTIONS = ("headers", "auth", "client_kwargs", "encoded", "ssl", "proxy")  # others are for other stores


def read_web(
    uris: Sequence[str], ranges: Sequence[tuple[int, int] | None], most: int, options: Mapping[str, Any]
) -> list[bytes | Exception]:
    """Fetch http(s) objects, or byte ranges [start, end) of them, concurrently; a failed one is its exception."""
    filesystem = web_filesystem(options)

    def fetch(places: Sequence[int]) -> list[bytes | Exception]:
        wanted = [(uris[i], ranges[i]) for i in places]
        found: list[bytes | Exception] = sync(filesystem.loop, _fetch_all, filesystem, wanted, most)
        return found

    return fetch_with_retries(fetch, len(uris), ATTEMPTS, LAST_START)


def web_filesystem(options: Mapping[str, Any]) -> Any:
    """The fsspec filesystem for http(s), with the options that are meant for it."""
    return fsspec.filesystem("http", **{key: options[key] for key in _OWN_OPTIONS if key in options})


async def _fetch_all(
    filesystem: Any, wanted: Sequence[tuple[str, tuple[int, int] | None]], most: int
) -> list[bytes | BaseException]:
    turn = asyncio.Semaphore(TOGETHER)

    async def one(url: str, span: tuple[int, int] | None) -> bytes:
        async with turn:
            return await _fetch(filesystem, url, span, most)

    return await asyncio.gather(*(one(*item) for item in wanted), return_exceptions=True)


async def _fetch(filesystem: Any, url: str, span: tuple[int, int] | None, most: int) -> bytes:
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=WHOLE, connect=CONNECT, sock_connect=CONNECT, sock_read=SILENCE)
    options = dict(filesystem.kwargs)
    if span is not None and span[0]:
        options["headers"] = dict(options.get("headers", {})) | {"Range": f"bytes={span[0]}-{span[1] - 1}"}
    session = await filesystem.set_session()
    async with session.get(filesystem.encode_url(url), timeout=timeout, **options) as response:
        if response.status == 404:
            raise FileNotFoundError(url)
        if response.status in (429, 500, 502, 503, 504):
            raise aiohttp.ClientConnectionError(f"the server answers {response.status}")  # retried
        response.raise_for_status()
        data = bytearray()
        async for chunk in response.content.iter_chunked(_CHUNK):
            data += chunk
            if len(data) > most:
                raise too_large(None, most)
        if span is None or response.status == 206:
            return bytes(data)
        return bytes(data[span[0] : span[1]])  # a server that ignores ranges
