"""Tars of images (WebDataset): listed by their headers, so that little more than the headers is read."""

import io
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from cliper.pipeline.config import InputConfig
from cliper.pipeline.corpus.left_out import LeftOut
from cliper.pipeline.corpus.sources.entry import Entry, header_stamp
from cliper.pipeline.corpus.sources.files import Found
from cliper.pipeline.corpus.sources.select import Selection
from cliper.pipeline.errors import InputError
from cliper.pipeline.parallel import map_ahead
from cliper.pipeline.storage.backend import Storage
from cliper.pipeline.storage.uris import is_local

READERS = 32  # tars listed at the same time
BLOCK = 512
FIRST_WINDOW, LAST_WINDOW = BLOCK + 1, 256 * 1024  # bytes of one request; tarfile looks one byte before a header
SMALL_GAP = 32 * 1024  # bytes that are read rather than skipped, for they cost less than one more request


@dataclass
class Listed:
    """What one tar holds."""

    entries: list[Entry] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)


class DamagedError(Exception):
    """A tar that does not go on, or end, as it should, at byte `offset`."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(reason)
        self.offset = offset


def list_tars(storage: Storage, files: Iterable[Found], config: InputConfig, left_out: LeftOut) -> Iterator[Entry]:
    """Uncompressed tars (one, a folder, a glob or a brace range): every member with an image's ending.

    Raises InputError for a damaged tar, or leaves out what is behind the damage with `config.skip_damaged`.
    """
    selection = Selection(config, left_out)
    tars = (found for found in files if found.how == "named" or selection.container(found.name, (".tar",), "tar"))
    with ThreadPoolExecutor(READERS) as pool:
        for listed in map_ahead(pool, lambda tar: list_tar(storage, tar, config), tars, ahead=READERS):
            left_out.add(listed.left_out)
            yield from listed.entries


def list_tar(storage: Storage, tar: Found, config: InputConfig) -> Listed:
    """List one tar. Raises InputError as `list_tars` does."""
    listed = Listed()
    reader = _TarReader(tar, Selection(config, listed.left_out), listed)
    with _open(storage, tar) as handle:
        try:
            reader.read(handle)
        except DamagedError as damage:
            where = f"{tar.uri} is damaged at byte {damage.offset} ({damage})"
            count = f"images found before it: {len(listed.entries)}"
            if not config.skip_damaged:
                what = f"{tar.uri} is not an uncompressed tar: {damage}" if not damage.offset else where
                raise InputError(
                    f"{what}; {count}. Repair it, or go on without what follows: --skip-damaged"
                ) from damage
            listed.left_out.skip(tar.name, "damaged: what follows the damage is lost")
            listed.left_out.note(f"{where}; {count}")
    return listed


class _TarReader:
    """Adds the images of one tar to `listed`."""

    def __init__(self, tar: Found, selection: Selection, listed: Listed) -> None:
        self.tar, self.selection, self.listed = tar, selection, listed
        self.stem = tar.name[:-4] if tar.name.lower().endswith(".tar") else tar.name
        self.files: dict[str, tarfile.TarInfo] = {}  # regular members, for the links
        self.links: list[tarfile.TarInfo] = []

    def read(self, handle: Any) -> None:
        """Read all archives in the file: tars put one behind the other are one. Raises DamagedError."""
        end = handle.seek(0, io.SEEK_END)
        start: int | None = 0
        while start is not None:
            start = self._read_archive(handle, start, end)
        for link in self.links:
            self._add_link(link)

    def _read_archive(self, handle: Any, start: int, end: int) -> int | None:
        """Read the archive at byte `start`; returns where the next one begins."""
        handle.seek(start)
        archive = None
        try:
            archive = tarfile.TarFile(fileobj=handle)
            for member in archive:
                if member.isreg() and member.offset_data + member.size > end and not member.issparse():
                    self._cut_off(member, end)
                    return None
                self._add(member)
        except tarfile.TarError as error:
            raise DamagedError(archive.offset if archive else start, str(error)) from error
        return _after_end(handle, archive.offset)

    def _cut_off(self, member: tarfile.TarInfo, end: int) -> None:
        """The file ends inside a member: an image is an entry that fails as truncated; anything else is damage."""
        before = len(self.listed.entries)
        self._add(member)
        if len(self.listed.entries) == before:
            raise DamagedError(end, f"it ends inside {member.name}")
        self.selection.left_out.note(
            f"{self.tar.uri} is cut off at byte {end}, inside {member.name}, its last member"
        )

    def _add(self, member: tarfile.TarInfo) -> None:
        if member.islnk() or member.issym():
            self.links.append(member)
        elif member.issparse():
            self.selection.left_out.skip(member.name, "a sparse member; pack it without --sparse")
        elif member.isreg():
            self.files[member.name] = member
            self._add_image(member.name, member)
        elif not member.isdir():
            self.selection.left_out.skip(member.name, "not a regular member")

    def _add_link(self, link: tarfile.TarInfo) -> None:
        folder = link.name.rpartition("/")[0]
        name = link.linkname if link.islnk() else _joined(folder, link.linkname)
        target = self.files.get(name) or self.files.get(link.linkname)
        if target is None:
            self.selection.left_out.skip(link.name, "a link to nothing in the tar")
        else:
            self._add_image(link.name, target)

    def _add_image(self, name: str, member: tarfile.TarInfo) -> None:
        image_id = f"{self.stem}/{name}"
        if self.selection.image(name, image_id):
            alone = member.offset_data - member.offset == BLOCK  # no header of a long name before its own
            stamp = header_stamp(member, own_name=alone)
            self.listed.entries.append(
                Entry(image_id, self.tar.uri, member.size, offset=member.offset_data, stamp=stamp)
            )


def _joined(folder: str, target: str) -> str:
    """A symbolic link's target as a member's name."""
    parts: list[str] = folder.split("/") if folder else []
    for part in target.split("/"):
        if part == "..":
            parts = parts[:-1]
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


def _after_end(handle: Any, place: int) -> int | None:
    """Check the end-of-archive mark at byte `place`; returns where something follows it, or None.

    tarfile stops at anything that is not a header, also at a damaged one.
    """
    handle.seek(place)
    block = handle.read(BLOCK)
    if len(block) < BLOCK:
        raise DamagedError(place, "it ends without an end-of-archive mark")
    if block.strip(b"\0"):
        raise DamagedError(place, "no valid header, and not the end of the archive")
    while chunk := handle.read(64 * 1024):
        place += len(block)
        block = chunk
        filled = len(chunk) - len(chunk.lstrip(b"\0"))
        if filled < len(chunk):
            return place + filled // BLOCK * BLOCK
    return None


class _HeaderReads(io.RawIOBase):
    """A remote file for reading headers that lie far apart.

    A read far behind the last one fetches FIRST_WINDOW bytes, a header; every read at most SMALL_GAP behind it
    doubles that, up to LAST_WINDOW. So large members cost few bytes, and small ones few requests.
    """

    def __init__(self, storage: Storage, uri: str, size: int) -> None:
        self.storage, self.uri, self.size = storage, uri, size
        self.place, self.start, self.window, self.held = 0, 0, FIRST_WINDOW, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self.place = {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence] + offset
        return self.place

    def read(self, size: int | None = -1, /) -> bytes:
        """Read at most `size` bytes from the current place; fewer only at the end of the file."""
        wanted = self.size - self.place if size is None or size < 0 else min(size, self.size - self.place)
        if wanted <= 0:
            return b""
        inside = self.place - self.start
        if not (inside >= 0 and inside + wanted <= len(self.held)):
            self._fetch(wanted)
            inside = self.place - self.start
        data = self.held[inside : inside + wanted]
        self.place += len(data)
        return data

    def _fetch(self, wanted: int) -> None:
        end = self.start + len(self.held)
        goes_on = self.start <= self.place <= end + SMALL_GAP
        self.window = min(2 * self.window, LAST_WINDOW) if goes_on else FIRST_WINDOW
        stop = min(self.place + max(wanted, self.window), self.size)
        self.held, self.start = self.storage.read_range(self.uri, self.place, stop), self.place


def _open(storage: Storage, tar: Found) -> Any:
    if is_local(tar.uri):
        return storage.open(tar.uri)
    return _HeaderReads(storage, tar.uri, storage.size(tar.uri) if tar.size is None else tar.size)
