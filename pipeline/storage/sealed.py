"""Parquet files that prove themselves: a seal in the footer holds the SHA-256 of the footer and of all before it.

Page checksums cover pages, not their headers and not the footer, where one flipped bit can mean another column or
another number of rows. The seal is the value of SEAL in the footer's metadata; files without one (of older
versions) are taken as they are.
"""

import hashlib
import io
import re
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SEAL = "cliper.seal"
WHOLE = 16 << 20  # bytes: a file up to this is read and checked whole, a larger one page by page

_BLANK = "0" * 64
_VALUE = re.compile(rb"cliper\.seal.{1,4}sha256:([0-9a-f]{64}):([0-9a-f]{64})", re.DOTALL)
_MAGIC = b"PAR1"
_END = 8  # bytes: the footer's length and _MAGIC


class DamagedFileError(ValueError):
    """A file was changed after it was written."""


class SealedWriter:
    """Write Parquet with page checksums and a seal."""

    def __init__(self, schema: pa.Schema, **options: Any) -> None:
        """`options` go to pyarrow's ParquetWriter."""
        kept = {key: value for key, value in (schema.metadata or {}).items() if key != SEAL.encode()}
        self._buffer = io.BytesIO()
        self._schema = schema.with_metadata(kept)
        self._writer = pq.ParquetWriter(self._buffer, self._schema, write_page_checksum=True, **options)

    def write(self, table: pa.Table, row_group_size: int) -> None:
        """Add rows."""
        table = table.replace_schema_metadata(self._schema.metadata)
        self._writer.write_table(table, row_group_size=row_group_size)

    def close(self, metadata: Mapping[str, str] | None = None) -> bytes:
        """The file's bytes; `metadata` is added to its footer."""
        self._writer.add_key_value_metadata(dict(metadata or {}) | {SEAL: f"sha256:{_BLANK}:{_BLANK}"})
        self._writer.close()
        return _sealed(self._buffer.getvalue())


def _sealed(data: bytes) -> bytes:
    start = len(data) - _END - _footer_length(data[-_END:], len(data))
    body, footer, end = data[:start], data[start:-_END], data[-_END:]
    footer = _filled(footer, _BLANK, hashlib.sha256(body).hexdigest())
    digests = _digests(footer)
    assert digests is not None
    return body + _filled(footer, hashlib.sha256(footer).hexdigest(), digests[1]) + end


def open_sealed(handle: Any, whole: bool = False, most: int = WHOLE) -> pq.ParquetFile:
    """Open a Parquet file of ours from a seekable binary handle, its seal checked; pages are checked when read.

    Files of at most `most` bytes, or all with `whole`, are read into memory and checked to the last byte. Raises
    DamagedFileError or pyarrow's errors.
    """
    size = handle.seek(0, io.SEEK_END)
    if whole or size <= most:
        handle.seek(0)
        data = handle.read()
        check_seal(data)
        return pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True)
    handle.seek(size - _END)
    length = _footer_length(handle.read(_END), size)
    handle.seek(size - _END - length)
    check_footer(handle.read(length))
    handle.seek(0)
    return pq.ParquetFile(handle, page_checksum_verification=True)


def check_seal(data: bytes) -> str:
    """Check a whole file; returns its footer's digest, "" without a seal. Raises DamagedFileError."""
    start = len(data) - _END - _footer_length(data[-_END:], len(data))
    footer = data[start:-_END]
    digest = check_footer(footer)
    found = _digests(footer)
    if found is not None and hashlib.sha256(memoryview(data)[:start]).hexdigest() != found[1]:
        raise DamagedFileError("its bytes are not those that were written")
    return digest


def check_footer(footer: bytes) -> str:
    """Check a footer; returns its digest, "" without a seal. Raises DamagedFileError."""
    found = _digests(footer)
    if found is None:
        if SEAL.encode() in footer:
            raise DamagedFileError("its footer is not the one that was written")
        return ""
    if hashlib.sha256(_filled(footer, _BLANK, found[1])).hexdigest() != found[0]:
        raise DamagedFileError("its footer is not the one that was written")
    return found[0]


def tail_is_whole(tail: bytes, size: int) -> bool:
    """Whether the last bytes of a file of `size` bytes are the end of a whole Parquet file.

    Checks the footer if `tail` holds it, else its mark alone.
    """
    try:
        length = _footer_length(tail[-_END:], size)
        if length + _END <= len(tail):
            check_footer(tail[-_END - length : -_END])
    except DamagedFileError:
        return False
    return True


def _footer_length(end: bytes, size: int) -> int:
    if len(end) < _END or end[4:] != _MAGIC:
        raise DamagedFileError("it does not end like a Parquet file: cut off, or something else")
    length = int.from_bytes(end[:4], "little")
    if length + _END + len(_MAGIC) > size:
        raise DamagedFileError("its footer is longer than the file")
    return length


def _digests(footer: bytes) -> tuple[str, str] | None:
    found = _VALUE.search(footer)
    return None if found is None else (found[1].decode(), found[2].decode())


def _filled(footer: bytes, of_footer: str, of_body: str) -> bytes:
    found = _VALUE.search(footer)
    assert found is not None
    return footer[: found.start(1)] + f"{of_footer}:{of_body}".encode() + footer[found.end(2) :]


def sealed_table(table: pa.Table, **options: Any) -> bytes:
    """A table as one sealed file; `options` go to pyarrow's ParquetWriter."""
    writer = SealedWriter(table.schema, **options)
    writer.write(table, max(1, len(table)))
    return writer.close()


def read_sealed(data: bytes, schema: pa.Schema) -> pa.Table:
    """The rows of a file, every byte checked, as a table of `schema`. Raises DamagedFileError."""
    try:
        return open_sealed(io.BytesIO(data), whole=True).read().select(schema.names).cast(schema)
    except DamagedFileError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise DamagedFileError(" ".join(str(error).split())[:200]) from error
