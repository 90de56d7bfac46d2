"""What a source yields."""

import tarfile
import zlib
from dataclasses import dataclass
from typing import Any

from cliper.pipeline.errors import InputError

LONGEST_ID = 4096  # characters
ETAG, MTIME = "etag ", "mtime "  # how the stamps of files begin


@dataclass(frozen=True)
class Entry:
    """One image: a file, a byte range of a file (`offset`, `bytes`), or a row of a Parquet file (`row`).

    `bytes` is the encoded size; for a row it is the mean of its row group, number `group` of the file. `stamp` is
    what else tells the image from one that took its place: of a file, its ETag or modification time (ns), if the
    listing has it; of a member of a tar, see `header_stamp`; of a row, the column that holds its id.
    """

    image_id: str
    uri: str
    bytes: int | None = None
    offset: int | None = None
    row: int | None = None
    group: int | None = None
    stamp: str | None = None

    @property
    def place(self) -> str:
        """Where the image is, for messages."""
        if self.offset is not None:
            return f"{self.uri} at byte {self.offset}"
        return self.uri if self.row is None else f"{self.uri}, row {self.row}"

    @property
    def remedy(self) -> str:
        """How to give the image another id."""
        if self.offset is not None:
            return "members of one tar need different names: rename one, or leave it out (--exclude)"
        if self.row is not None:
            return "give every row another value in the id column, or name another column (--id-column)"
        return "give every line of the list another id in a column (--id-column), or remove one of the two"


def header_stamp(header: tarfile.TarInfo, own_name: bool) -> str:
    """What a tar's header says of its member: checksum, size, time and name.

    Without `own_name`, only the checksum: the rest may stand in headers before it, for long names for example.
    """
    if not own_name:
        return f"{header.chksum} 0 0 0"
    name = zlib.crc32(header.name.encode("utf-8", "surrogateescape"))
    return f"{header.chksum} {header.size} {int(header.mtime)} {name}"


def checked_id(value: Any, where: str) -> str:
    """The id of an image: a whole number, or text that is not blank. Raises InputError that names `where`."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        kind = "missing" if value is None else f"{type(value).__name__} {value!r:.40}"
        raise InputError(f"{where}: the image id is {kind}; an id is text or a whole number (--id-column)")
    text = str(value)
    if not text.strip() or "\0" in text or len(text) > LONGEST_ID:
        raise InputError(
            f"{where}: the image id is {text!r:.60}; an id has 1 to {LONGEST_ID} characters, none of them null "
            "(--id-column)"
        )
    if not is_unicode(text):
        raise InputError(f"{where}: the image id {text!r:.60} is not valid Unicode (--id-column)")
    return text


def is_unicode(text: str) -> bool:
    """Whether text can be stored as UTF-8; a file's name may hold bytes that cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
