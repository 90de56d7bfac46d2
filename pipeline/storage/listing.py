"""Listings of S3: streamed page by page in the order of names, many pages at the same time.

A prefix of more than a page is cut into ranges of keys at the borders of its folders; each range is listed on its
own, and the pages are put together in order. Cutting by ranges keeps the number of requests near the number of
pages, however small the folders are. A bucket without folders is listed one page after the other.
"""

import math
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import islice, takewhile
from queue import Empty, Full, Queue
from threading import Event
from typing import Any
from xml.etree import ElementTree

from fsspec.utils import glob_translate

from cliper.pipeline.parallel import map_ahead
from cliper.pipeline.storage.retry import with_retries

PAGE = 1000  # keys per request, the protocol's maximum
TOGETHER = 16  # requests at the same time
HELD = 4  # pages per range that wait to be consumed
PAGES = 2  # of a range, at least, as far as the first page tells
RANGES = 512  # at most
BORDERS = 16  # enough folders to cut at; with fewer, the folders in them are looked up as well
_DEPTH = 4  # levels of folders that are looked up
_FOLDER_PAGES = 8  # of one look-up, as long as they name folders
_MAGIC = re.compile(r"[*?\[]")

Key = tuple[str, int, float, str | None]  # the key, bytes, seconds since 1970 by the store's clock, ETag


class _UnsortedError(Exception):
    """The store does not list from a given key on, or not in order."""


def list_s3(filesystem: Any, path: str) -> Iterator[Key]:
    """Yield the objects below bucket/prefix in the order of their keys, which are relative to `path`."""
    bucket, _, key = path.partition("/")
    prefix = f"{key}/" if key else ""
    for name, size, modified, tag in _Listing(filesystem, bucket).below(prefix):
        if not name.endswith("/"):  # zero-byte folder markers
            yield name.removeprefix(prefix), size, modified, tag


def glob_s3(filesystem: Any, path: str) -> Iterator[Key]:
    """Yield the objects that match a pattern, bucket/key, in the order of their keys; `**` matches any folders."""
    bucket, _, pattern = path.partition("/")
    listing, parts = _Listing(filesystem, bucket), pattern.split("/")
    if "**" in pattern:
        fixed = next(i for i, part in enumerate(parts) if _MAGIC.search(part))
        prefix, matches = "".join(f"{part}/" for part in parts[:fixed]), re.compile(glob_translate(pattern)).match
        yield from (found for found in listing.below(prefix) if matches(found[0]) and found[0][-1] != "/")
        return
    for _, keys in listing.levels(listing.folders(parts[:-1]), parts[-1]):
        yield from keys


@dataclass(frozen=True)
class Span:
    """A part of a listing that is listed on its own: the keys after `start`, up to but without `stop`.

    `pattern`: only keys that match it; `direct`: only those directly in the folder of the prefix.
    """

    prefix: str
    start: str = ""
    stop: str | None = None
    pattern: str | None = None
    direct: bool = False


def spans_s3(filesystem: Any, path: str) -> Iterator[Span]:
    """Cut the listing of bucket/prefix, or of a pattern, into spans: in order, each with few pages if possible."""
    bucket, _, key = path.partition("/")
    listing, parts = _Listing(filesystem, bucket), key.split("/")
    magic = next((i for i, part in enumerate(parts) if _MAGIC.search(part)), None)
    if magic is None:
        yield from listing.spans(f"{key}/" if key else "", None)
    elif "**" in key:
        yield from listing.spans("".join(f"{part}/" for part in parts[:magic]), key)
    else:
        stem = parts[-1][: match.start()] if (match := _MAGIC.search(parts[-1])) else parts[-1]
        for folder in listing.folders(parts[:-1]):
            yield Span(folder + stem, pattern=key, direct=True)


def list_span(filesystem: Any, bucket: str, span: Span) -> Iterator[Key]:
    """Yield the objects of a span in the order of their keys, which are whole."""
    matches = None if span.pattern is None else re.compile(glob_translate(span.pattern)).match
    more = {"Delimiter": "/"} if span.direct else {}
    for keys in _Listing(filesystem, bucket).range(span.prefix, span.start, span.stop, **more):
        yield from (key for key in keys if key[0][-1] != "/" and (matches is None or matches(key[0])))


@dataclass(frozen=True)
class _Page:
    keys: list[Key]
    folders: list[str]  # ending in "/", with a delimiter
    token: str | None  # of the next page


class _Listing:
    """Requests for one bucket."""

    def __init__(self, filesystem: Any, bucket: str) -> None:
        filesystem.s3.meta.events.register("before-parse.s3.ListObjectsV2", _parse_page, unique_id="cliper")
        self._request = partial(filesystem.call_s3, "list_objects_v2", Bucket=bucket)

    def pages(self, prefix: str, **more: str) -> Iterator[_Page]:
        """Every page below a prefix, one after the other."""
        while True:
            page = self._page(prefix, **more)
            yield page
            if page.token is None:
                return
            more = {key: value for key, value in more.items() if key != "StartAfter"}
            more["ContinuationToken"] = page.token

    def _page(self, prefix: str, **more: str) -> _Page:
        found = with_retries(partial(self._request, Prefix=prefix, MaxKeys=PAGE, **more))
        keys = [
            (entry["Key"], int(entry["Size"]), entry["LastModified"].timestamp(), entry.get("ETag"))
            for entry in found.get("Contents", [])
        ]
        folders = [entry["Prefix"] for entry in found.get("CommonPrefixes", [])]
        return _Page(keys, folders, found.get("NextContinuationToken") if found.get("IsTruncated") else None)

    def below(self, prefix: str) -> Iterator[Key]:
        """Every key below a prefix, in order."""
        pages = self.pages(prefix)
        first = next(pages)
        yield from first.keys
        if first.token is None:
            return
        last = first.keys[-1][0] if first.keys else ""
        in_order = all(a[0] < b[0] for a, b in zip(first.keys, first.keys[1:], strict=False))
        borders = self._borders(prefix, first) if in_order else []
        try:
            for key in self._ranges(prefix, [last, *borders]) if borders else _keys(pages):
                yield key
                last = key[0]
        except _UnsortedError:
            yield from (key for key in _keys(self.pages(prefix)) if key[0] > last)

    def _ranges(self, prefix: str, starts: Sequence[str]) -> Iterator[Key]:
        """The keys after the first start, listed from every start on at the same time."""
        stops: list[str | None] = [*starts[1:], None]
        with ThreadPoolExecutor(TOGETHER) as pool:
            yield from _in_order(
                pool, [partial(self.range, prefix, *ends) for ends in zip(starts, stops, strict=True)]
            )

    def spans(self, prefix: str, pattern: str | None) -> Iterator[Span]:
        """The spans of a prefix; a single one if the store does not list from a given key on."""
        first = next(self.pages(prefix))
        borders = self._borders(prefix, first) if first.token is not None else []
        if borders:
            behind = next(self.pages(prefix, StartAfter=borders[0]))
            if behind.keys and behind.keys[0][0] <= borders[0]:
                borders = []
        for start, stop in zip(["", *borders], [*borders, None], strict=True):
            yield Span(prefix, start, stop, pattern)

    def range(self, prefix: str, start: str, stop: str | None, **more: str) -> Iterator[list[Key]]:
        """The pages after key `start`, up to but without `stop`."""
        last = start
        for page in self.pages(prefix, **({"StartAfter": start} if start else {}), **more):
            if page.keys and page.keys[0][0] <= last:
                raise _UnsortedError
            yield [key for key in page.keys if stop is None or key[0] < stop]
            last = page.keys[-1][0] if page.keys else last
            if stop is not None and last >= stop:
                return

    def _borders(self, prefix: str, first: _Page) -> list[str]:
        """Folders behind the first page at which to cut, in order."""
        with ThreadPoolExecutor(TOGETHER) as pool:
            found, level = set(), [prefix]
            for _ in range(_DEPTH):
                level = [folder for folders in pool.map(self._folders, level) for folder in folders]
                found.update(level)
                if not level or len(found) >= BORDERS:
                    break
        last = first.keys[-1][0] if first.keys else ""
        on_first = sum(folder <= last for folder in found) or 1
        together = max(math.ceil(PAGES * on_first), math.ceil(len(found) / RANGES))
        return sorted(folder for folder in found if folder > last)[::together]

    def _folders(self, prefix: str) -> list[str]:
        pages = takewhile(lambda page: page.folders, self.pages(prefix, Delimiter="/"))
        return [folder for page in islice(pages, _FOLDER_PAGES) for folder in page.folders]

    def folders(self, parts: Sequence[str]) -> list[str]:
        """The folders that match a pattern, by its parts."""
        folders = [""]
        for part in parts:
            folders = (
                [f"{folder}{part}/" for folder in folders]
                if not _MAGIC.search(part)
                else [child for children, _ in self.levels(folders, part) for child in children]
            )
        return folders

    def levels(self, folders: Sequence[str], part: str) -> Iterator[tuple[list[str], list[Key]]]:
        """The folders and keys directly in each of `folders` that match one part of a pattern, in order."""
        magic, matches = _MAGIC.search(part), re.compile(glob_translate(part)).match
        stem = part[: magic.start()] if magic else part

        def one(folder: str) -> tuple[list[str], list[Key]]:
            pages = list(self.pages(folder + stem, Delimiter="/"))
            children = [child for page in pages for child in page.folders if matches(child[len(folder) : -1])]
            return children, [key for page in pages for key in page.keys if matches(key[0][len(folder) :])]

        with ThreadPoolExecutor(TOGETHER) as pool:
            yield from map_ahead(pool, one, folders, ahead=2 * TOGETHER)


def _keys(pages: Iterator[_Page]) -> Iterator[Key]:
    return (key for page in pages for key in page.keys)


def _in_order(pool: ThreadPoolExecutor, sources: Sequence[Callable[[], Iterator[list[Key]]]]) -> Iterator[Key]:
    """What every source yields, one source after the other; TOGETHER of them run ahead, HELD lists each."""
    over = Event()
    running: deque[tuple[Future[None], Queue[list[Key] | None]]] = deque()
    waiting = iter(sources)

    def begin() -> None:
        for source in islice(waiting, 1):
            queue: Queue[list[Key] | None] = Queue(HELD)
            running.append((pool.submit(_fill, source, queue, over), queue))

    try:
        for _ in range(TOGETHER):
            begin()
        while running:
            future, queue = running[0]
            while (keys := _taken(queue, future)) is not None:
                yield from keys
            future.result()
            running.popleft()
            begin()
    finally:
        over.set()


def _fill(source: Callable[[], Iterator[list[Key]]], queue: "Queue[list[Key] | None]", over: Event) -> None:
    for keys in source():
        while not over.is_set():
            try:
                queue.put(keys, timeout=0.2)
                break
            except Full:
                continue
        if over.is_set():
            return


def _taken(queue: "Queue[list[Key] | None]", future: "Future[None]") -> list[Key] | None:
    """The next list, or None when the source has ended."""
    while True:
        done = future.done()  # before looking: what a source put, it put before its end
        try:
            return queue.get(timeout=0.001 if done else 0.05)
        except Empty:
            if done:
                return None


def _parse_page(response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: Any) -> None:
    """Parse a page of a listing in place of botocore, which takes several times as long; a handler of its event.

    Leaves errors, and answers that are no XML, to botocore.
    """
    if response_dict["status_code"] != 200:
        return
    try:
        root = ElementTree.fromstring(response_dict["body"])
    except ElementTree.ParseError:
        return
    page: dict[str, Any] = {"Contents": [], "CommonPrefixes": []}
    for child in root:
        name = _plain(child.tag)
        if name in page:
            page[name].append({_plain(field.tag): field.text or "" for field in child})
        elif name == "IsTruncated":
            page[name] = child.text == "true"
        elif name in ("NextContinuationToken", "EncodingType"):
            page[name] = child.text
    for entry in page["Contents"]:
        entry["LastModified"] = datetime.fromisoformat(entry["LastModified"])
        entry["Size"] = int(entry["Size"])
    customized_response_dict.update(page)
    response_dict["body"] = b"<ListBucketResult/>"


def _plain(tag: str) -> str:
    return tag.rpartition("}")[2]
