"""File names for image ids: they cannot leave the folder, clash on any file system, or break a tool's parsing.

A name is the id without its image extension, percent-encoded: letters, digits and marks of any script, `-` and `_`
are kept, every other character becomes %XX of its UTF-8 bytes, and `urllib.parse.unquote` decodes it. If a name
would be too long, is used by another image (ignoring case), or is reserved on Windows, it ends in `~` and a hash
of the id. An export lists every name with its id in cliper-images.jsonl.
"""

import hashlib
import unicodedata
from collections.abc import Collection, Iterable

import numpy as np

from cliper.pipeline.corpus.decode import SUFFIXES

MAX_BYTES = 180  # file systems allow 255; suffixes and temporary names need the rest
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(1, 10))}


def file_name(image_id: str, clashing: Collection[int] = ()) -> str:
    """The file name of an image, without extension; `clashing` are the keys that several images share."""
    name = _quoted(image_id)
    long = len(name.encode()) > MAX_BYTES
    if not name or long or name.lower() in _RESERVED or (clashing and _key(name) in clashing):
        return f"{_shortened(name)}~{hashlib.blake2b(image_id.encode(), digest_size=8).hexdigest()}"
    return name


def clashing_names(batches: Iterable[Iterable[str]]) -> frozenset[int]:
    """Keys of the names that several image ids would get. Memory: 8 bytes per image."""
    keys = [np.array([_key(_quoted(image_id)) for image_id in batch], dtype=np.uint64) for batch in batches]
    if not keys:
        return frozenset()
    found, counts = np.unique(np.concatenate(keys), return_counts=True)
    return frozenset(found[counts > 1].tolist())


def _quoted(image_id: str) -> str:
    ending = next((suffix for suffix in SUFFIXES if image_id.lower().endswith(suffix)), "")
    return "".join(c if _plain(c) else _percent(c) for c in image_id[: len(image_id) - len(ending)])


def _plain(character: str) -> bool:
    return character in "-_" or unicodedata.category(character)[0] in "LNM"


def _percent(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode())


def _key(name: str) -> int:
    """A key that is equal for names that some file system treats as the same."""
    same = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
    return int.from_bytes(hashlib.blake2b(same.encode(), digest_size=8).digest(), "big")


def _shortened(name: str) -> str:
    """Truncate to MAX_BYTES including the hash, never inside a character or an escape."""
    room = MAX_BYTES - 17
    cut = name.encode()[:room].decode(errors="ignore")
    escape = cut.rfind("%", len(cut) - 2)
    return cut[:escape] if len(cut) < len(name) and escape >= 0 else cut
