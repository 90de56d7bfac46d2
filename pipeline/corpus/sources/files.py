"""The files that an input names: a file, a folder or prefix, a glob, or a brace range of any of these."""

import os
import posixpath
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from braceexpand import braceexpand
from fsspec.utils import glob_translate

from cliper.pipeline.corpus.left_out import LeftOut
from cliper.pipeline.corpus.sources.entry import ETAG, MTIME
from cliper.pipeline.errors import InputError
from cliper.pipeline.storage.backend import Storage, Stored
from cliper.pipeline.storage.direct import bare_tag
from cliper.pipeline.storage.listing import Span
from cliper.pipeline.storage.refusals import access_errors
from cliper.pipeline.storage.uris import is_local, join

MOST_DEEP = 100  # folders below the input; links may make a tree deeper than it is
_MAGIC = re.compile(r"[*?\[]")
_BRACES = re.compile(r"\{[^{}]*(?:,|\.\.)[^{}]*\}")


@dataclass(frozen=True)
class Found:
    """A file: its name relative to the input, its URI, and its size in bytes if the listing has it.

    `how`: "named" (the input itself), "matched" (a glob), or "in folder". `stamp`: see Entry.
    """

    name: str
    uri: str
    size: int | None
    how: str
    stamp: str | None = None


def find(storage: Storage, uri: str, left_out: LeftOut) -> Iterator[Found]:
    """Yield the files in a fixed order. Names with `[ ] { } ? *` that exist mean themselves.

    Raises InputError for a missing path; counts other than regular files in `left_out`.
    """
    fixed, rest = _literal_part(storage, uri)
    match = _BRACES.search(rest)
    if match is None:
        yield from _find(storage, uri, left_out)
        return
    base = (fixed + rest[: match.start()]).rpartition("/")[0]
    for piece in (fixed + expanded for expanded in braceexpand(rest, escape=False)):
        count = 0
        for found in _find(storage, piece, left_out):
            count += 1
            yield replace(found, name=found.uri.removeprefix(base).lstrip("/"))
        if not count:
            raise InputError(f"{piece}, which is part of {uri}, does not exist or holds nothing")


def _find(storage: Storage, uri: str, left_out: LeftOut) -> Iterator[Found]:
    if not is_local(uri) and not uri.partition("://")[2].strip("/"):
        raise InputError(f"{uri} names no {'server' if uri.startswith('http') else 'bucket'}")
    if uri.startswith(("http://", "https://")):  # a query's ? is no wildcard, and servers have no folders
        name = posixpath.basename(uri.partition("?")[0])
        if not name:
            raise InputError(f"{uri} names no file; a web address is that of one list, tar or image")
        yield Found(name, uri, None, "named")
    elif is_local(uri):
        yield from _find_local(Path(storage.filesystem(uri)[1]), uri, left_out)
    elif _MAGIC.search(uri) and not _exists(storage, uri):
        yield from _remote_glob(storage, uri)
    else:
        yield from _remote_folder(storage, uri)


def _literal_part(storage: Storage, uri: str) -> tuple[str, str]:
    """Cut a URI behind the longest folder or object that exists under just this name."""
    if _exists(storage, uri):
        return uri, ""
    if not is_local(uri):
        return "", uri
    fixed = next(folder for folder in Path(uri).parents if os.path.lexists(folder))
    kept = str(fixed).rstrip("/")
    return kept, uri[len(kept) :]


def _exists(storage: Storage, uri: str) -> bool:
    """Whether a URI with special characters is the name of something; without, it is taken for one."""
    if not (_MAGIC.search(uri) or _BRACES.search(uri)):
        return True
    if is_local(uri):
        return os.path.lexists(storage.filesystem(uri)[1])
    return not uri.startswith(("http://", "https://")) and storage.exists(uri)


def _remote_folder(storage: Storage, uri: str) -> Iterator[Found]:
    """The objects below a prefix, or the object of that name."""
    empty = True
    for stored in storage.list_stored(uri):
        empty = False
        if stored.name:
            yield Found(stored.name, join(uri, stored.name), stored.size, "in folder", etag_stamp(stored.tag))
        else:  # some stores list an object below itself
            yield Found(posixpath.basename(uri), uri, stored.size, "named", etag_stamp(stored.tag))
    if empty and uri.partition("://")[2].strip("/").count("/"):
        yield Found(posixpath.basename(uri), uri, storage.size(uri), "named")


def _remote_glob(storage: Storage, pattern: str) -> Iterator[Found]:
    return _named(pattern, storage.glob(pattern), "matched")


def _named(uri: str, objects: Iterable[Stored], how: str) -> Iterator[Found]:
    """Objects by path inside the filesystem; names are relative to the longest folder without a wildcard."""
    scheme, _, path = uri.partition("://")
    fixed = path.rstrip("/") if how == "in folder" else path[: _first_magic(path)].rpartition("/")[0]
    for stored in objects:
        name = stored.name.removeprefix(f"{fixed}/")
        yield Found(name, f"{scheme}://{stored.name}", stored.size, how, etag_stamp(stored.tag))


def cut(storage: Storage, uri: str) -> tuple[str, Iterator[Span]] | None:
    """The parts of an s3:// prefix or pattern that can be listed at the same time, and their files' `how`.

    None for any other input, for a single object too.
    """
    if not uri.startswith("s3://") or _BRACES.search(uri):
        return None
    first = next(find(storage, uri, LeftOut()), None)
    if first is None or first.how == "named":
        return None
    return first.how, storage.spans(uri)


def find_in(storage: Storage, uri: str, how: str, span: Span) -> Iterator[Found]:
    """Yield the files of one span, as `find` yields them."""
    return _named(uri, storage.list_span(uri, span), how)


def etag_stamp(tag: str | None) -> str | None:
    """The stamp of an object, from its ETag as the store writes it."""
    return f"{ETAG}{bare_tag(tag)}" if tag else None


def mtime_stamp(found: os.stat_result) -> str:
    """The stamp of a local file."""
    return f"{MTIME}{found.st_mtime_ns}"


def _first_magic(path: str) -> int:
    match = _MAGIC.search(path)
    return match.start() if match else len(path)


def _find_local(path: Path, uri: str, left_out: LeftOut) -> Iterator[Found]:
    if os.path.lexists(path):
        yield from _named_local(path, uri, left_out)
    elif _MAGIC.search(str(path)):
        yield from _local_glob(path, left_out)
    else:
        raise InputError(f"input {uri} does not exist")


def _named_local(path: Path, uri: str, left_out: LeftOut) -> Iterator[Found]:
    try:
        found = path.stat()
    except OSError as error:
        raise InputError(f"input {uri} cannot be opened: {error.strerror}") from error
    if stat.S_ISDIR(found.st_mode):
        with access_errors(uri):
            yield from (replace(item, uri=join(uri, item.name)) for item in _walk(path, left_out, MOST_DEEP))
    elif stat.S_ISREG(found.st_mode):
        yield Found(path.name, uri, found.st_size, "named", mtime_stamp(found))
    else:
        raise InputError(f"input {uri} is neither a file nor a folder, but a FIFO, socket or device")


def _local_glob(pattern: Path, left_out: LeftOut) -> Iterator[Found]:
    """Walk the longest folder that exists as it is written; names are relative to it."""
    fixed = next(folder for folder in pattern.parents if os.path.lexists(folder))
    rest = pattern.relative_to(fixed).as_posix()
    matches = re.compile(glob_translate(rest)).match
    depth = MOST_DEEP if "**" in rest else rest.count("/")
    with access_errors(str(pattern)):
        unmatched = LeftOut()  # only matches of the pattern are part of the input
        for found in _walk(fixed, unmatched, depth):
            if matches(found.name):
                yield replace(found, how="matched")
    for line in unmatched.notes:
        left_out.note(line)


def _walk(top: Path, left_out: LeftOut, deepest: int) -> Iterator[Found]:
    """Regular files below a folder, depth first in sorted order. Links are followed, but not back into a folder
    that the walk is already in."""

    def below(folder: str, prefix: str, inside: tuple[tuple[int, int], ...]) -> Iterator[Found]:
        """The files of one folder; `inside` are the folders that the walk is in, by device and inode."""
        with os.scandir(folder) as entries:
            children = sorted(entries, key=lambda entry: entry.name)
        for entry in children:
            name = prefix + entry.name
            try:
                found = entry.stat()
            except OSError as error:
                left_out.skip(name, f"a broken link ({error.strerror})")
                continue
            if stat.S_ISDIR(found.st_mode):
                here = found.st_dev, found.st_ino
                if len(inside) > deepest or here in inside:
                    if deepest == MOST_DEEP or here in inside:
                        left_out.skip(name, "a link to a folder it is in" if here in inside else "too deep")
                    continue
                yield from below(entry.path, f"{name}/", (*inside, here))
            elif stat.S_ISREG(found.st_mode):
                yield Found(name, entry.path, found.st_size, "in folder", mtime_stamp(found))
            else:
                left_out.skip(name, "not a regular file")

    start = top.stat()
    yield from below(str(top), "", ((start.st_dev, start.st_ino),))
