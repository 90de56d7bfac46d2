"""JSON files of ours with a digest of their content, so that damage is noticed by whoever reads them."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from cliper.pipeline.storage.sealed import DamagedFileError

DIGEST = "digest"
_SHA256 = re.compile(r"[0-9a-f]{64}")


def with_digest(content: Mapping[str, Any], indent: int | None = None) -> bytes:
    """The content as JSON in UTF-8; the value of DIGEST is the SHA-256 of the rest, without `indent`."""
    text = _text(content)
    if indent is not None or not content:
        return _text({DIGEST: _sha256(text), **content}, indent)
    return b'{"%b": "%b", ' % (DIGEST.encode(), _sha256(text).encode()) + text[1:]


def checked(data: bytes, required: bool = True) -> dict[str, Any]:
    """The content of such a file, without its digest; unless `required`, files of before have none.

    Raises DamagedFileError, a ValueError.
    """
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedFileError("it is not JSON") from error
    if not isinstance(found, dict):
        raise DamagedFileError("it is not a JSON object")
    required = required or _begins_with_a_digest(found)  # its name may be what is damaged
    stored = found.pop(DIGEST, None)
    if stored != _sha256(_text(found)) and (required or stored is not None):
        raise DamagedFileError("its content is not what was written")
    return found


def _begins_with_a_digest(content: Mapping[str, Any]) -> bool:
    first = next(iter(content.values()), None)
    return isinstance(first, str) and _SHA256.fullmatch(first) is not None


def _text(content: Mapping[str, Any], indent: int | None = None) -> bytes:
    return json.dumps(content, indent=indent, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _sha256(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()
