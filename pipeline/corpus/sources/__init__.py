"""Where images come from. A source is a function that yields one Entry per image; add one to SOURCES."""

import posixpath
from collections.abc import Callable, Iterator
from pathlib import Path

from cliper.model.errors import CliperError
from cliper.pipeline.config import InputConfig
from cliper.pipeline.corpus.left_out import LeftOut
from cliper.pipeline.corpus.sources.entry import Entry
from cliper.pipeline.corpus.sources.images import list_images
from cliper.pipeline.corpus.sources.lists import LISTS, list_uris
from cliper.pipeline.corpus.sources.parquet import list_parquet_images
from cliper.pipeline.corpus.sources.refused import refusal, saved_dataset
from cliper.pipeline.corpus.sources.tars import list_tars
from cliper.pipeline.errors import InputError
from cliper.pipeline.storage.backend import Storage, absolute, explain, is_local

__all__ = ["SOURCES", "Entry", "LeftOut", "detect_format", "list_entries", "no_images"]

SOURCES: dict[str, Callable[[Storage, str, InputConfig, LeftOut], Iterator[Entry]]] = {
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
    if not uri.strip():
        raise InputError("the input is empty; name a folder, file, glob or URI (--input)")
    uri = absolute(uri)
    if is_local(uri):
        uri = storage.filesystem(uri)[1]
    counts = LeftOut() if left_out is None else left_out
    try:
        name = config.format if config.format != "auto" else detect_format(uri)
        yield from SOURCES[name](storage, uri, config, counts)
    except CliperError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        silent = " or its server does not answer" if uri.startswith("http") else ""
        raise InputError(f"input {uri} does not exist{silent}") from error
    except Exception as error:  # backends and libraries raise nearly any type; the user gets one line
        raise InputError(f"input {uri} cannot be listed: {explain(error)}") from error


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
