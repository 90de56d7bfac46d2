"""Where images come from. A source is a function from files to one Entry per image; add one to SOURCES.

A corpus is listed by this process, or piece by piece by the workers of a crew: the files of a piece go through the
same source, and the pieces are put together in order. So the entries do not depend on the workers.
"""

import posixpath
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import pyarrow as pa

from cliper.model.errors import CliperError
from cliper.pipeline.config import InputConfig
from cliper.pipeline.corpus.left_out import LeftOut
from cliper.pipeline.corpus.sources.entry import Entry
from cliper.pipeline.corpus.sources.files import Found, cut, find, find_in
from cliper.pipeline.corpus.sources.images import list_images
from cliper.pipeline.corpus.sources.lists import LISTS, list_uris
from cliper.pipeline.corpus.sources.parquet import list_parquet_images
from cliper.pipeline.corpus.sources.refused import refusal, saved_dataset
from cliper.pipeline.corpus.sources.tables import ENTRIES, packed, tables_of, unpacked
from cliper.pipeline.corpus.sources.tars import list_tars
from cliper.pipeline.errors import InputError
from cliper.pipeline.parallel import Crew
from cliper.pipeline.storage.backend import Storage
from cliper.pipeline.storage.listing import Span
from cliper.pipeline.storage.refusals import explain
from cliper.pipeline.storage.uris import absolute, is_local

__all__ = ["SOURCES", "Entry", "LeftOut", "detect_format", "list_entries", "list_tables", "no_images"]

SOURCES: dict[str, Callable[[Storage, Iterable[Found], InputConfig, LeftOut], Iterator[Entry]]] = {
    "images": list_images,
    "list": list_uris,
    "parquet": list_parquet_images,
    "tar": list_tars,
}


def list_entries(
    storage: Storage, uri: str, config: InputConfig, left_out: LeftOut | None = None
) -> Iterator[Entry]:
    """Yield the corpus in a fixed order; what is in the input and not in the corpus is counted in `left_out`.

    Raises CliperError (InputError, StorageError) and nothing else.
    """
    uri, counts = _place(storage, uri), LeftOut() if left_out is None else left_out
    with _input_errors(uri):
        source = SOURCES[_form(uri, config)]
        yield from source(storage, find(storage, uri, counts), config, counts)


def list_tables(
    storage: Storage, uri: str, config: InputConfig, left_out: LeftOut, team: Crew
) -> Iterator[pa.Table]:
    """Yield the entries of `list_entries` as tables of ENTRIES, listed by a crew. Raises as it does.

    A list of URIs is read by this process. Memory: the names in one piece, compressed, for each call of the crew.
    """
    uri = _place(storage, uri)
    with _input_errors(uri):
        form = _form(uri, config)
    if form == "list":
        yield from tables_of(list_entries(storage, uri, config, left_out))
        return
    listing, walked = _Listing(storage, uri, config, form), LeftOut()
    with _input_errors(uri):
        for first in team.map(listing, _pieces(storage, uri, form, walked)):
            for listed in listing.whole(first):
                left_out.add(listed.left_out)
                yield unpacked(listed.table)
    left_out.add(walked)


@dataclass(frozen=True)
class Piece:
    """A part of a corpus: some of its files, or `spans` of a listing, whose files have this `how`."""

    files: Sequence[Found] = ()
    spans: Sequence[Span] = ()
    how: str = ""


@dataclass(frozen=True)
class Listed:
    """The entries of a piece, packed; `rest`: the files behind the first MOST."""

    table: bytes
    left_out: LeftOut
    rest: Piece | None


MOST = 1_000_000  # files that one call lists
SPANS = 16  # folders of a pattern that one call lists
FILES = {"images": 5_000, "tar": 8, "parquet": 8}  # of one piece, by format


def _pieces(storage: Storage, uri: str, form: str, left_out: LeftOut) -> Iterator[Piece]:
    """Cut the corpus; independent of the workers."""
    spans = cut(storage, uri) if form == "images" else None
    if spans is None:
        files = find(storage, uri, left_out)
        while some := list(islice(files, FILES[form])):
            yield Piece(files=some)
        return
    how, parts = spans
    for span in parts:
        together = [span, *(islice(parts, SPANS - 1) if span.direct else ())]
        yield Piece(spans=together, how=how)


@dataclass(frozen=True)
class _Listing:
    """Lists pieces of a corpus; sent to the workers."""

    storage: Storage
    uri: str
    config: InputConfig
    form: str

    def __call__(self, piece: Piece) -> Listed:
        """List one piece."""
        left_out = LeftOut()
        with _input_errors(self.uri):
            files, rest = self._files(piece)
            entries = SOURCES[self.form](self.storage, files, self.config, left_out)
            table = pa.concat_tables([ENTRIES.empty_table(), *tables_of(entries)])
        return Listed(packed(table), left_out, rest)

    def whole(self, listed: Listed) -> Iterator[Listed]:
        """A result, and those of the rest of its piece, which this process lists."""
        yield listed
        while listed.rest is not None:
            listed = self(listed.rest)
            yield listed

    def _files(self, piece: Piece) -> tuple[Sequence[Found], Piece | None]:
        """The first MOST files of a piece, and the rest."""
        if not piece.spans:
            return piece.files, None
        files: list[Found] = []
        for number, span in enumerate(piece.spans):
            files += islice(find_in(self.storage, self.uri, piece.how, span), MOST - len(files))
            if len(files) == MOST:
                key = files[-1].uri.partition("://")[2].partition("/")[2]
                left = [replace(span, start=key), *piece.spans[number + 1 :]]
                return files, replace(piece, spans=left)
        return files, None


@contextmanager
def _input_errors(uri: str) -> Iterator[None]:
    """Turn the errors of a listing into InputError; a CliperError passes through."""
    try:
        yield
    except CliperError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        silent = " or its server does not answer" if uri.startswith("http") else ""
        raise InputError(f"input {uri} does not exist{silent}") from error
    except Exception as error:  # backends and libraries raise nearly any type; the user gets one line
        raise InputError(f"input {uri} cannot be listed: {explain(error)}") from error


def _place(storage: Storage, uri: str) -> str:
    """The one form of an input's URI. Raises InputError for an empty one."""
    if not uri.strip():
        raise InputError("the input is empty; name a folder, file, glob or URI (--input)")
    uri = absolute(uri)
    return storage.filesystem(uri)[1] if is_local(uri) else uri


def _form(uri: str, config: InputConfig) -> str:
    return config.format if config.format != "auto" else detect_format(uri)


def detect_format(uri: str) -> str:
    """Go by the ending: .parquet, .csv, .jsonl and the like are lists, .tar is WebDataset, else image files.

    Raises InputError for archives and containers that are not read.
    """
    if is_local(uri) and Path(uri).is_dir():
        return "images"
    name = (uri.partition("?")[0] if uri.startswith("http") else uri).lower()
    if name.endswith(LISTS):
        return "list"
    if name.endswith(".tar"):
        return "tar"
    if (reason := refusal(uri)) is not None:
        raise InputError(reason)
    return "images"


def no_images(uri: str, left_out: LeftOut) -> InputError:
    """The error of a corpus without images, with what was left out and why."""
    if (saved := saved_dataset(uri)) is not None:
        return InputError(f"no images found in {uri}: {saved}")
    left = [line.removeprefix("left out  ") for line in left_out.lines() if line.startswith("left out")]
    found = f". In it, left out: {'; '.join(left)}" if left else ""
    found += "".join(f". {note}" for note in left_out.notes)
    hint = "check the path, or name its form (--format images, list, parquet or tar)"
    name = posixpath.basename(uri.rstrip("/"))
    deeper = "; '*' does not look into folders, '**' does" if "*" in name and "**" not in uri else ""
    return InputError(f"no images found in {uri}; {hint}{deeper}{found}")
