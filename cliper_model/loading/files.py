"""JSON files of weights, and the hash that identifies files."""

import hashlib
import json
from pathlib import Path
from typing import Any

from cliper.model.errors import WeightsError


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that must hold an object. Raises WeightsError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds {type(content).__name__}, not an object of settings")
    return content


def sha256_of(files: tuple[Path, ...] | list[Path]) -> str:
    """Return one hash over names and contents of `files` (hex, 64 characters)."""
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as handle:
            total.update(path.name.encode() + hashlib.file_digest(handle, "sha256").digest())
    return total.hexdigest()
