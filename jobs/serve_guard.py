"""What `cliper serve` lets in: requests of its own page, and files that were uploaded to it."""

import ipaddress
import os
import stat
from collections.abc import Awaitable, Callable, Collection, Iterable, MutableMapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cliper.pipeline.errors import ImageError

MOST_UPLOAD = 100 << 20  # bytes of one image file

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def read_upload(path: str, folders: Iterable[Path], most: int = MOST_UPLOAD) -> bytes:
    """The bytes of a regular file below one of `folders`, at most `most` of them.

    The path comes from whoever reaches the port. Raises ImageError, with the same words for every path outside, so
    that nobody learns which files exist.
    """
    refused = ImageError("missing", "this is not an uploaded image; choose it again")
    try:
        real = Path(path).resolve(strict=True)
        if not any(real.is_relative_to(folder.resolve()) for folder in folders):
            raise refused
        # Not blocking: opening a FIFO waits for its other end.
        handle = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except (OSError, ValueError, RuntimeError):
        raise refused from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise refused
    with os.fdopen(handle, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ImageError("oversized", f"the file has more than {most >> 20} MB")
    return data


class OwnPageOnly:
    """ASGI middleware: refuse requests that pages of other sites make, and hosts that are not this server.

    A browser sends Origin with what another site's page asks for, and Host as the name that page's author chose:
    without this, any page in the user's browser could use the server (DNS rebinding).
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], names: Sequence[str]) -> None:
        """`names`: host names of this server, besides its addresses and localhost."""
        self.app, self.names = app, {name.lower() for name in names} | {"localhost"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 403, or hand on."""
        headers = {name.lower(): value.decode("latin-1") for name, value in scope.get("headers", [])}
        if scope["type"] not in ("http", "websocket") or self.allows(headers.get(b"host"), headers.get(b"origin")):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            text = b"This request does not come from the page of this server (see cliper serve --name)."
            plain = [(b"content-type", b"text/plain"), (b"content-length", str(len(text)).encode())]
            await send({"type": "http.response.start", "status": 403, "headers": plain})
            await send({"type": "http.response.body", "body": text})

    def allows(self, host: str | None, origin: str | None) -> bool:
        """Whether a request with these headers is one of the page's own."""
        return is_own(host, origin, self.names)


def is_own(host: str | None, origin: str | None, names: Collection[str]) -> bool:
    """Whether a request with these headers comes from the page of this server.

    `names`: its host names in small letters; addresses need none.
    """
    if host is None or not _is_here(urlsplit(f"//{host}").hostname, names):
        return False
    return origin is None or urlsplit(origin).netloc.lower() == host.lower()


def _is_here(name: str | None, names: Collection[str]) -> bool:
    try:
        ipaddress.ip_address(name or "")
    except ValueError:
        return (name or "").lower() in names
    return True
